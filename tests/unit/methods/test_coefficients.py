"""What is done to coefficients, against the equations; the moves that come of it, against plain arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods
from zotune.methods.coefficients import FITNESS, ByDeviation, ByRootMeanSquare, BySign, State
from zotune.methods.kernel import MOMENTS, Kernel
from zotune.methods.posterior import ByPosterior
from zotune.methods.selection import Selection
from zotune.rng.directions import Directions, Key
from zotune.subspaces import LowRank


def test_signs():
    assert BySign().shape([0.5, -3.0, 0.0], [False] * 3, 1e-3, {}) == [1.0, -1.0, 0.0]


def test_the_deviation_leaves_out_skipped_directions():
    eps, here, losses = 1e-2, 2.0, torch.tensor([2.5, 1.0, 3.0, 2.25], dtype=torch.float64)
    coefficients = ((losses - here) / eps).tolist()
    shaped = ByDeviation().shape(coefficients, [False] * 4, eps, {})
    assert shaped == pytest.approx([c / float(losses.std()) for c in coefficients])
    shaped = ByDeviation().shape([*coefficients, 0.0], [False] * 4 + [True], eps, {})
    assert shaped == pytest.approx([c / float(losses.std()) for c in coefficients] + [0.0])
    assert ByDeviation().shape([1.0, 1.0], [False] * 2, eps, {}) == [0.0, 0.0]
    assert ByDeviation().shape([1.0, 0.0], [False, True], eps, {}) == [0.0, 0.0]


def test_the_root_mean_square_is_adams_of_the_coefficient():
    state: State = {}
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=1.0, betas=(0.0, 0.9))
    for c in (0.5, -2.0, 0.1, 3.0):
        (shaped,) = ByRootMeanSquare(0.9).shape([c], [False], 1e-3, state)
        before, p.grad = float(p.detach()), torch.tensor([c], dtype=torch.float64)
        adam.step()
        assert shaped == pytest.approx(before - float(p.detach()), rel=1e-6)


def test_the_posterior_is_that_of_a_kalman_filter():
    """BSZO's observations along axes, the last along the top eigenvector of the covariance, in matrices."""
    shaping, state, generator = ByPosterior(alpha=0.1, reuse=1).sized(250_000), State(), torch.Generator().manual_seed(0)
    s = 0.25
    for _ in range(6):
        y = 0.7 * torch.randn(3, generator=generator, dtype=torch.float64)
        mean, covariance = torch.zeros(3, dtype=torch.float64), 0.25 * torch.eye(3, dtype=torch.float64)
        for place in range(4):
            top = torch.linalg.eigh(covariance).eigenvectors[:, -1].abs().argmax()
            axis = torch.eye(3, dtype=torch.float64)[place if place < 3 else int(top)]
            residual = float(axis @ (y - mean))
            s = 0.9 * s + 0.1 * residual**2
            gain = covariance @ axis / (axis @ covariance @ axis + max(0.05**2, s))
            mean, covariance = mean + gain * residual, covariance - torch.outer(gain, axis @ covariance)
        assert shaping.shape(y.tolist(), [False] * 3, 1e-3, state) == pytest.approx((3 * mean).tolist())
    assert state == {"s": pytest.approx(s)}
    assert shaping.shape([0.5, 9.0], [False, True], 1e-3, dict(state))[1] == 0.0


@pytest.mark.parametrize(("kind", "cubed"), [("cubic", 0.0), ("linear", 0.6)])
def test_kernels_have_the_moments_they_are_made_for(kind, cubed):
    kernel, r = Kernel(kind), torch.linspace(-1, 1, 2001, dtype=torch.float64)
    weights = torch.tensor([kernel.weight(float(each)) for each in r], dtype=torch.float64)
    for power, expected in ((1, 1.0), (3, cubed)):
        assert float(torch.trapezoid(r**power * weights, r)) / 2 == pytest.approx(expected, abs=1e-4)
    assert float(torch.trapezoid((r * weights) ** 2, r)) / 2 == pytest.approx(MOMENTS[kind], rel=1e-4)
    lengths = torch.tensor([kernel.length(0, step, 0) for step in range(4000)])
    assert float(lengths.mean()) == pytest.approx(0.0, abs=0.05) and float(lengths.square().mean()) == pytest.approx(1 / 3, abs=0.03)
    assert lengths.abs().max() <= 1


def test_z_scores_and_ranks_of_a_population():
    losses = torch.tensor([3.0, 1.0, 1.0, 10.0], dtype=torch.float64)
    z = (losses - losses.mean()) / losses.std(unbiased=False)
    table = losses.unsqueeze(1) + torch.tensor([-1.0, 0.0, 1.0])  # of three examples
    plus, minus = table[:2], table[2:]
    assert torch.allclose(FITNESS["z-score"].coefficients(plus, minus), ((z[:2] - z[2:]) / 2).float())
    ranks = torch.tensor([1 / 6, -1 / 3, -1 / 3, 1 / 2])  # places 2, 0½, 0½, 3 of 0..3, over 3, less ½
    assert torch.allclose(FITNESS["ranks"].coefficients(plus, minus), (ranks[:2] - ranks[2:]) / 2)


def test_z_scores_within_a_prompt_are_grpos_advantages():
    """Each example (column) by its own mean and deviation over the points, 0 where all are equal; the mean of those."""
    table = torch.tensor([[1.0, 500.0, 0.1], [0.0, 100.0, 0.1], [0.0, 300.0, 0.1], [1.0, 300.0, 0.1]])
    z = (table - table.mean(dim=0)) / table.std(dim=0, unbiased=False).clamp(min=1e-3)
    expected = (z[:2] - z[2:])[:, :2].sum(dim=1) / 3 / 2
    assert torch.allclose(FITNESS["prompt-z-score"].coefficients(table[:2], table[2:]), expected)


@pytest.mark.parametrize("fitness", ["z-score", "ranks", "prompt-z-score"])
def test_fitness_ignores_units_and_ranks_ignore_outliers(fitness):
    generator = torch.Generator().manual_seed(0)
    plus, minus = torch.randn(2, 6, 1, generator=generator).double()
    there = FITNESS[fitness].coefficients(plus, minus)
    assert torch.allclose(FITNESS[fitness].coefficients(5 * plus + 3, 5 * minus + 3), there)
    far = torch.where(plus == torch.maximum(plus.max(), minus.max()), plus * 100, plus)
    assert torch.equal(FITNESS[fitness].coefficients(far, minus), there) == (fitness == "ranks")


def test_fitness_leaves_points_out_that_have_no_loss():
    plus, minus = torch.tensor([[1.0], [math.nan], [2.0]]), torch.tensor([[0.0], [1.0], [1.5]])
    kept = [0, 2]
    found = FITNESS["ranks"].coefficients(plus, minus)
    assert float(found[1]) == 0.0
    assert torch.equal(found[kept], FITNESS["ranks"].coefficients(plus[kept], minus[kept]))


def reference_step(model: nn.Module, moves: dict[str, torch.Tensor], lr: float) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= lr * moves[name]
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", ["fzoo", "es", "zo-sgd-scalar-sign", "kerzoo"])
def test_a_step_is_its_equation(name):
    """From the losses of the points, evaluated by hand on copies of the model."""
    model, eps, lr, k = toys.classifier(), 1e-2, 1e-3, 5
    x, before = toys.batch(), copy.deepcopy(model)
    method = methods.get(name, eps=eps, num_directions=k)
    directions = [{n: Directions(method.direction).draw(Key(0, 0, j, n), p.shape) for n, p in before.named_parameters()} for j in range(k)]

    def loss(scale: float, j: int) -> torch.Tensor:
        moved = reference_step(copy.deepcopy(before), directions[j], -scale)
        return toys.loss_function(moved)(x).detach().double().mean()

    lengths = [method.kernel.length(0, 0, j) if method.kernel else 1.0 for j in range(k)]
    plus, minus = (torch.stack([loss(sign * eps * lengths[j], j) for j in range(k)]) for sign in (1, -1))
    if name == "fzoo":
        weights = (plus - loss(0.0, 0)) / eps / plus.std()
    elif name == "kerzoo":
        weights = torch.tensor([15 / 4 * r * (5 - 7 * r**2) for r in lengths]) * (plus - minus) / (2 * eps)
    elif name == "es":
        both = torch.cat([plus, minus])
        weights = (plus - minus) / 2 / both.std(unbiased=False)
    else:
        weights = (plus - minus).sign()
    ZerothOrder(model, method, lr=lr).step(toys.loss_function(model), x)
    moves = {n: sum(float(w) * z[n] for w, z in zip(weights, directions, strict=True)) / k for n, _ in model.named_parameters()}
    expected = reference_step(copy.deepcopy(before), moves, lr)
    for (n, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours - dict(before.named_parameters())[n], theirs - dict(before.named_parameters())[n], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["mezo-greedy", "mezo-gv"])
def test_a_step_along_chosen_directions_is_its_equation(name):
    """From losses evaluated by hand on copies of the model, of candidates and of what is chosen."""
    model, eps, lr, m = toys.classifier(), 1e-2, 1e-2, 5
    before, method, x = copy.deepcopy(model), methods.get(name, eps=eps, num_directions=m), toys.batch()
    z = [{n: Directions("gaussian").draw(Key(0, 0, k, n), p.shape) for n, p in model.named_parameters()} for k in range(m)]

    def along(weights: list[float]) -> dict[str, torch.Tensor]:
        return {n: sum(w * each[n] for w, each in zip(weights, z, strict=True)) for n in z[0]}

    def loss(weights: list[float], scale: float) -> float:
        return float(toys.loss_function(reference_step(copy.deepcopy(before), along(weights), -scale))(x).double().mean())

    each = [[float(i == k) for i in range(m)] for k in range(m)]
    order = sorted(range(m), key=lambda k: loss(each[k], eps))
    assert order[0] != 0
    weights = each[order[0]]
    if name == "mezo-gv":
        weights = [1 / 2 if k in order[:2] else -1 / 3 for k in range(m)]
    slope = (loss(weights, eps) - loss(weights, -eps)) / (2 * eps)
    optimizer = ZerothOrder(model, method, lr=lr)
    optimizer.step(toys.loss_function(model), x)
    assert optimizer.last_report.coefficients.tolist() == pytest.approx([m * slope * w for w in weights], rel=1e-2)
    expected = reference_step(copy.deepcopy(before), along(weights), lr * slope)
    for ours, theirs, start in zip(model.parameters(), expected.parameters(), before.parameters(), strict=True):
        assert torch.allclose(ours - start, theirs - start, rtol=2e-2, atol=1e-6)


def test_candidates_that_are_not_finite_are_not_chosen():
    assert Selection().weights([math.nan, 3.0, 2.0, math.inf, 2.0]) == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert Selection().weights([math.inf, math.nan]) == [1.0, 0.0]
    assert Selection(0.5).weights([2.0, math.nan, 1.0, 3.0, 4.0]) == [0.5, 0.0, 0.5, -0.5, -0.5]
    assert Selection(0.9).weights([3.0, 1.0, 2.0]) == [-1.0, 0.5, 0.5] and Selection(0.1).weights([1.0, math.inf]) == [1.0, 0.0]


def test_a_guiding_vector_of_two_is_mezo_with_the_sum():
    """v = ± (Z_1 − Z_2), of which the sign does not matter."""
    (model, other), x = (toys.classifier(), toys.classifier()), toys.batch()
    z = [{n: Directions("gaussian").draw(Key(0, 0, k, n), p.shape) for n, p in model.named_parameters()} for k in range(2)]
    optimizer = ZerothOrder(model, methods.mezo_gv(num_directions=2, eps=1e-2), lr=1e-2)
    optimizer.step(toys.loss_function(model), x)
    first, second = optimizer.last_report.coefficients.tolist()
    assert first == -second != 0
    with torch.no_grad():
        for n, p in other.named_parameters():
            p -= 1e-2 * first / 2 * (z[0][n] - z[1][n])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_conservative_step_is_the_best_of_three(tmp_path):
    """The loss after a step is the lowest of those at θ − ηĝ, θ and θ + ηĝ, and the journal says which that was."""
    model, lr = toys.classifier(), 0.5  # too far, now and then
    optimizer = ZerothOrder(model, "zo-sgd-cons", lr=lr, journal=tmp_path / "j")
    taken = set()
    for step in range(40):
        x, before = toys.batch(seed=step), copy.deepcopy(model)
        optimizer.step(toys.loss_function(model), x)
        c = float(optimizer.last_report.coefficients)
        raw = optimizer.last_report.loss_diff / (2 * optimizer.eps)
        z = {n: Directions("gaussian").draw(Key(0, step, 0, n), p.shape) for n, p in before.named_parameters()}
        losses = {}
        for sign in (1, 0, -1):
            moved = reference_step(copy.deepcopy(before), z, sign * lr * raw)
            losses[sign] = float(toys.loss_function(moved)(x).mean())
        place = round(c / raw)
        taken.add(abs(place))
        assert losses[place] <= min(losses.values()) + 1e-5
        assert float(toys.loss_function(model)(x).detach().mean()) == pytest.approx(losses[place], abs=1e-4)
    assert taken == {0, 1}


def test_a_step_of_random_search_ends_at_its_best_point(tmp_path):
    """The weights are those of the point with the lowest loss, or stay where no point has a lower one; the journal has every loss."""
    model, k, eps, radii = toys.classifier(), 3, 0.05, (0.5, 1.0)
    optimizer = ZerothOrder(model, methods.randopt(num_directions=k, eps=eps, radii=radii), journal=tmp_path / "j")
    taken = set()
    for step in range(12):
        x, before = toys.batch(seed=step), copy.deepcopy(model)
        optimizer.step(toys.loss_function(model), x)
        points = [before]
        for j in range(k):
            z = {n: Directions("gaussian").draw(Key(0, step, j, n), p.shape) for n, p in before.named_parameters()}
            points.append(reference_step(copy.deepcopy(before), z, -eps * radii[j % 2]))
        losses = torch.stack([toys.loss_function(point)(x).detach().double().mean() for point in points])
        assert torch.allclose(optimizer.last_report.coefficients.double() * eps, losses[1:] - losses[0], atol=1e-5)
        best = int(losses.argmin())
        taken.add(best)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), points[best].parameters(), strict=True))
    assert {0, 1} <= taken and len(taken) > 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.randopt(radii=(1.0, 0.0)), "radii must be positive numbers, multiples of eps"),
        (lambda: methods.fzoo(num_directions=1), "set num_directions to at least 2"),
        (lambda: methods.es(directions_per="example"), "method 'es' has no option 'directions_per'"),
        (lambda: methods.meazo(beta=1.0), r"beta must lie in \[0, 1\)"),
        (lambda: methods.bszo(alpha=0.0), r"alpha must lie in \(0, 1\]"),
        (lambda: methods.bszo(prior="large"), "prior must be a positive number or 'auto'"),
        (lambda: methods.kerzoo(kernel="cube"), "unknown kernel 'cube'; did you mean 'cubic'"),
        (lambda: methods.mezo_gv(share=1.0), r"share must lie in \(0, 1\)"),
        (lambda: methods.mezo_greedy(num_directions=1), "set num_directions to at least 2"),
        (lambda: dataclasses.replace(methods.mezo_greedy(), estimator="central"), "set estimator to 'leave-one-out'"),
        (lambda: methods.replayed_adam(history=0), "history must be a whole number of at least 1"),
        (lambda: methods.replayed_momentum(momentum=1.0), "a decay rate must lie in"),
        (lambda: dataclasses.replace(methods.replayed_adam(), update_rule="Adam"), "leave update_rule at SGD"),
        (lambda: dataclasses.replace(methods.zo_sgd_cons(), subspace=LowRank()), "trains weights in full space"),
        (lambda: methods.jaguar_sign(choice="block:4"), "spelled 'block:16x16'"),
        (lambda: methods.jaguar_sign(choice="rows"), "unknown direction distribution 'rows'"),
        (lambda: methods.jaguar_sign(momentum=1.5), r"beta must lie in \[0, 1\)"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conservative_steps_want_one_rate():
    model = toys.classifier()
    parameters = list(model.parameters())
    optimizer = ZerothOrder(model, "zo-sgd-cons", params=[{"params": parameters[:2], "lr": 1.0}, {"params": parameters[2:], "lr": 0.5}])
    with pytest.raises(ValueError, match="give all parameter groups the same lr"):
        optimizer.step(toys.loss_function(model), toys.batch())
