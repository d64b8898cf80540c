"""The estimate points where it should: exact on quadratics, unbiased, with the second moments of METHODS' theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods
from zotune.forward.model import PerturbedForward
from zotune.methods.estimators import ESTIMATORS
from zotune.rng.directions import Directions, Key
from zotune.subspaces import Full, LowRankCoordinate, Offset


def estimates(method: methods.Method, model: nn.Module, loss, x, keys: int) -> torch.Tensor:
    """One ĝ per key, as a matrix (keys, d) in the space of the weights."""
    coordinates = [method.subspace.coordinate(n, p) for n, p in model.named_parameters()]
    directions, estimator, k = Directions(method.direction), ESTIMATORS[method.estimator], method.num_directions
    forward, rows = PerturbedForward(model, coordinates, directions), []
    for step in range(keys):
        for coordinate in coordinates:
            coordinate.begin_step(0, step * getattr(method.subspace, "interval", 1))  # a new V for every key
        points = [Offset(p.sign * method.eps, 0, step, p.direction) for p in estimator.points(k)]
        found = estimator.estimate([forward.evaluate(lambda: loss(x), p) for p in points], method.eps, k)
        row = []
        for coordinate in coordinates:
            z = sum(
                c / k * directions.draw(Key(0, step, i, coordinate.name), coordinate.shape)
                for i, c in enumerate(found.coefficients.tolist())
            )
            if isinstance(coordinate, LowRankCoordinate):
                z = z @ coordinate.v.T * coordinate.lr_scale
            row.append(z.reshape(-1))
        rows.append(torch.cat(row))
    forward.remove_hooks()
    return torch.stack(rows).double()


def gradient(model: nn.Module, loss, x) -> torch.Tensor:
    gradients = torch.autograd.grad(loss(x).mean(), list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients]).double()


@pytest.mark.parametrize("direction", Directions.KINDS)
@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("recipe", ["mezo", "lozo"])
def test_the_mean_over_keys_approaches_the_gradient(recipe, estimator, direction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(10, 5)

    def loss(x):
        return model(x).square().sum(dim=1)

    options = {"direction": direction, "estimator": estimator, "eps": 1e-3}
    if recipe == "lozo":
        options |= {"rank": 2, "interval": 1}
    found = estimates(methods.get(recipe, **options), model, loss, x, keys=400)
    error = found.mean(dim=0) - gradient(model, loss, x)
    # Per coordinate: within 5 standard errors (51 of them), and the forward difference's bias of order eps besides.
    bound = 5 * found.std(dim=0) / math.sqrt(len(found)) + (0.05 if estimator == "forward" else 1e-3)
    assert bool((error.abs() < bound).all())
    assert float(bound.max()) < float(gradient(model, loss, x).abs().max())


def test_on_a_quadratic_the_central_difference_is_exact():
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False).double()
    h = torch.randn(6, 6).double()

    def loss(x):
        w = model.weight[0]
        return (w @ h @ h.T @ w)[None]

    coordinate = Full().coordinate("weight", model.weight)
    forward, directions = PerturbedForward(model, [coordinate], Directions("gaussian")), Directions("gaussian")
    g = gradient(model, loss, None)
    for step in range(20):
        z = directions.draw(Key(0, step, 0, "weight"), (6,)).double()
        losses = [forward.evaluate(lambda: loss(None), Offset(s * 0.1, 0, step, 0)) for s in (1, -1)]
        c = ESTIMATORS["central"].estimate(losses, 0.1, 1).coefficients
        assert float(c) == pytest.approx(float(g @ z), rel=1e-5)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(("direction", "extra"), [("gaussian", +1), ("rademacher", -1), ("sphere", -1)])
def test_second_moments(direction, extra, k):
    """E‖ĝ‖² / ‖∇‖² is (d + K + 1)/K for the Gaussian, (d + K − 1)/K for Rademacher and the sphere."""
    torch.manual_seed(0)
    d = 12
    model = nn.Linear(d, 1, bias=False)
    x = torch.randn(1, d)
    method = methods.mezo(direction=direction, num_directions=k, eps=1e-2)
    found = estimates(method, model, lambda x: model(x)[:, 0], x, keys=1500)
    ratios = found.square().sum(dim=1) / x.double().square().sum()
    expected = (d + k + extra) / k
    assert abs(float(ratios.mean()) - expected) < 5 * float(ratios.std()) / math.sqrt(len(ratios))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_second_moment_of_the_low_rank_estimate(rank):
    """E‖c U Vᵀ / r‖² / ‖G‖² = mn + 2 + (2m + 2n + 2)/r, over U and V."""
    torch.manual_seed(0)
    m, n = 5, 6
    model = nn.Linear(n, m, bias=False)
    weight = torch.randn(m, n)
    method = methods.lozo(rank=rank, interval=1, eps=1e-2)
    found = estimates(method, model, lambda x: (model(x).T * weight).sum()[None], torch.eye(n), keys=2000)
    ratios = found.square().sum(dim=1) / weight.double().square().sum()
    expected = m * n + 2 + (2 * m + 2 * n + 2) / rank
    assert abs(float(ratios.mean()) - expected) < 5 * float(ratios.std()) / math.sqrt(len(ratios))


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"tangent"}))  # which is no difference of losses
def test_losses_that_are_not_finite_give_zero_and_are_flagged(estimator):
    points = ESTIMATORS[estimator].points(3)
    losses = [torch.tensor([1.0, 2.0 + p.sign * (0.1 + p.direction)]) for p in points]
    bad = next(i for i, p in enumerate(points) if p.direction == 1)
    losses[bad] = torch.tensor([float("nan"), 1.0])
    found = ESTIMATORS[estimator].estimate(losses, 0.1, 3)
    assert found.skipped == (False, True, False)
    assert found.coefficients[1] == 0 and found.coefficients[0] != 0 and math.isfinite(found.loss)


def test_leave_one_out_is_the_difference_to_the_mean_of_the_others():
    losses = torch.tensor([[1.0, 2.0], [4.0, 3.0], [2.0, 0.0]])
    found = ESTIMATORS["leave-one-out"].estimate(list(losses), 0.5, 3)
    assert found.coefficients.tolist() == pytest.approx([(1.5 - 2.25) / 0.5, (3.5 - 1.25) / 0.5, (1.0 - 2.5) / 0.5])
    assert torch.allclose(ESTIMATORS["leave-one-out"].singles(losses, 0.5, 3).mean(dim=1).float(), found.coefficients)
    assert all(ESTIMATORS["leave-one-out"].estimate([losses[0], losses[1] * math.nan], 0.5, 2).skipped)


def test_gap_noise_is_the_standard_error_of_the_gap():
    generator = torch.Generator().manual_seed(0)
    plus, minus = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    found = ESTIMATORS["central"].estimate([plus, minus], 1e-3, 1)
    difference = (plus - minus).double()
    assert found.loss_diff == pytest.approx(abs(float(difference.mean())))
    assert found.loss_diff_stderr == pytest.approx(float(difference.std()) / math.sqrt(50))
    assert ESTIMATORS["central"].estimate([plus[:1], minus[:1]], 1e-3, 1).loss_diff_stderr is None


@pytest.mark.parametrize("forward_batching", ["sequential", "auto"])
@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "lozo", "lozo-m"])
def test_forward_passes_are_counted_as_declared(name, forward_batching):
    calls = []
    model = toys.classifier()
    method = methods.get(name, num_directions=3)
    optimizer = ZerothOrder(model, method, lr=0.0, forward_batching=forward_batching)
    loss = toys.loss_function(model)

    def counted(batch):
        calls.append(len(batch[0]) / 8)
        return loss(batch)

    optimizer.step(counted, toys.batch())
    calls.clear()
    before = optimizer.forward_passes
    optimizer.step(counted, toys.batch())
    assert sum(calls) == method.forwards_per_step == optimizer.forward_passes - before == 6
    assert len(calls) == (6 if forward_batching == "sequential" else 1)  # one forward of six times the rows
