"""A direction per example: the coefficients are those of each example alone, and the noise falls with their number."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods, replay
from zotune.rng.directions import Directions, Key
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Offset

#: Options, and how many directions they make for a number of examples.
EXAMPLE = {"directions_per": "example"}
TWO = {"num_directions": 2, "directions_per": "example"}
GROUP = {"directions_per": "group", "group_size": 3}
EACH = pytest.mark.parametrize("options", [EXAMPLE, TWO, GROUP], ids=["example", "two an example", "group"])


def directions(options: dict, examples: int) -> int:
    return options.get("num_directions", 1) * examples // options.get("group_size", 1)


def perturbed(model: nn.Module, optimizer: ZerothOrder, step: int, direction: int, scale: float) -> nn.Module:
    """A copy of the plain model whose weights are at θ + scale · Z_direction, by hand."""
    hand = copy.deepcopy(model)
    with torch.no_grad():
        for coordinate, parameter in zip(optimizer.forward.coordinates, hand.parameters(), strict=True):
            z = optimizer.directions.draw(Key(0, step, direction, coordinate.name), coordinate.shape)
            parameter.add_(z @ coordinate.v.T if isinstance(coordinate, LowRankCoordinate) else z, alpha=scale)
    return hand


@pytest.mark.parametrize("forward_batching", ["batched", "sequential"])
@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("method", ["lozo", "lozo-m", "mezo"])
@pytest.mark.parametrize("each", [1, 3])
def test_a_coefficient_is_of_its_example_under_its_direction(method, estimator, forward_batching, each):
    model, (tokens, labels), eps = toys.classifier(), toys.batch(6), 1e-2
    plain = copy.deepcopy(model)
    options = {"num_directions": each, "directions_per": "example", "estimator": estimator, "eps": eps}
    optimizer = ZerothOrder(model, methods.get(method, **options), lr=0.0, forward_batching=forward_batching)
    optimizer.step(toys.loss_function(model), (tokens, labels))
    found = optimizer.last_report.coefficients
    assert found.shape == (6 * each,) and len(found.unique()) == 6 * each
    low, width = (-eps, 2 * eps) if estimator == "central" else (0.0, eps)
    for direction in range(6 * each):
        example = direction // each
        one = tokens[example : example + 1], labels[example : example + 1]
        plus, minus = (toys.loss_function(perturbed(plain, optimizer, 0, direction, scale))(one) for scale in (eps, low))
        assert float(found[direction]) == pytest.approx(float((plus - minus).detach()) / width, abs=2e-4)


def test_a_lozo_step_is_its_equation():
    """W ← W − η (1/B) Σ_b c_b U_b Vᵀ / r."""
    model, batch, lr = toys.classifier(), toys.batch(5), 1e-1
    before = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.lozo(directions_per="example", rank=2, eps=1e-2), lr=lr)
    optimizer.step(toys.loss_function(model), batch)
    expected = copy.deepcopy(before)
    with torch.no_grad():
        for coordinate, parameter in zip(optimizer.forward.coordinates, expected.parameters(), strict=True):
            for example, c in enumerate(optimizer.last_report.coefficients.tolist()):
                z = Directions("gaussian").draw(Key(0, 0, example, coordinate.name), coordinate.shape)
                z = z @ coordinate.v.T / 2 if isinstance(coordinate, LowRankCoordinate) else z
                parameter.sub_(z, alpha=lr * c / 5)
    state = model.state_dict()
    for name, parameter in expected.named_parameters():
        assert torch.allclose(state[name], parameter, atol=1e-5), name


@pytest.mark.parametrize("examples", [1, 4, 16])
def test_the_second_moment_falls_with_the_number_of_examples(examples):
    """E‖ĝ‖² = (d + 1)/B · mean ‖g_b‖² + ‖g‖² for Gaussian directions: the direction noise of one, over B."""
    torch.manual_seed(0)
    d = 12
    model, x = nn.Linear(d, 1, bias=False), torch.randn(examples, d)
    optimizer = ZerothOrder(model, methods.mezo(directions_per="example", eps=1e-2), lr=0.0)
    squares = []
    for step in range(1500):
        optimizer.step(lambda x: model(x)[:, 0], x)
        z = Directions("gaussian").draw_many(Key(0, step, 0, "weight"), examples, (d,))
        squares.append(float((optimizer.last_report.coefficients @ z / examples).square().sum()))
    found = torch.tensor(squares)
    expected = (d + 1) / examples * float(x.square().sum(dim=1).mean()) + float(x.mean(dim=0).square().sum())
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / math.sqrt(len(found))


@EACH
@pytest.mark.parametrize("forward_batching", ["batched", "sequential"])
def test_micro_batches_are_the_batch(options, forward_batching):
    tokens, labels = toys.batch(16)
    whole, parts = toys.classifier(), toys.classifier()
    method = methods.lozo_m(eps=1e-2, **options)
    first, second = (ZerothOrder(model, method, lr=1e-3, forward_batching=forward_batching) for model in (whole, parts))
    pieces = [(tokens[:4], labels[:4]), (tokens[4:10], labels[4:10]), (tokens[10:], labels[10:])]
    for _ in range(3):
        first.step(toys.loss_function(whole), (tokens, labels))
        second.step(toys.loss_function(parts), pieces)
        assert len(first.last_report.coefficients) == directions(options, 16)
        assert torch.allclose(first.last_report.coefficients, second.last_report.coefficients, atol=1e-3)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, parts.state_dict()[name], atol=1e-6)


def test_groups_of_unequal_size_weigh_as_their_examples_do():
    """With c_k = K n_k / N times the group's mean the mean over k is the mean over examples."""
    model = nn.Linear(3, 1, bias=False)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    optimizer = ZerothOrder(model, methods.mezo(directions_per="group", group_size=2, eps=1e-2), lr=0.0)
    optimizer.step(lambda x: model(x)[:, 0], x)
    z = Directions("gaussian").draw_many(Key(0, 0, 0, "weight"), 2, (3,))
    owners = torch.tensor([row * 2 // 5 for row in range(5)])
    expected = torch.stack([(x[owners == k] @ z[k]).sum() * 2 / 5 for k in range(2)])
    assert torch.allclose(optimizer.last_report.coefficients, expected, atol=1e-3)
    assert optimizer.last_report.loss_diff_stderr is not None


@EACH
@pytest.mark.parametrize("method", ["lozo", "lozo-m", "mezo-adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_and_replay_are_bit_for_bit(method, dtype, options, tmp_path):
    def build(**others) -> tuple[nn.Module, ZerothOrder]:
        model = toys.classifier(dtype)
        interval = {} if method == "mezo-adam" else {"interval": 4}
        return model, ZerothOrder(model, methods.get(method, **options, **interval), lr=1e-2, **others)

    def run(model: nn.Module, optimizer: ZerothOrder, first: int, last: int) -> None:
        for step in range(first, last):
            tokens, labels = toys.batch(7, seed=step)
            optimizer.step(toys.loss_function(model), [(tokens[:3], labels[:3]), (tokens[3:], labels[3:])])

    straight, optimizer = build(journal=tmp_path / "journal")
    run(straight, optimizer, 0, 10)
    halted, first = build()
    run(halted, first, 0, 6)
    resumed, second = build()
    resumed.load_state_dict(copy.deepcopy(halted.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(resumed, second, 6, 10)
    rebuilt = toys.classifier(dtype)
    replay(rebuilt, tmp_path / "journal")
    assert all(len(record.coefficients) == directions(options, 7) for record in optimizer.journal.records())
    for other in (resumed, rebuilt):
        assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("forward_batching", ["batched", "sequential"])
def test_an_example_whose_loss_is_not_finite_is_skipped_alone(forward_batching):
    def run(poison: float) -> ZerothOrder:
        model = toys.classifier()
        loss = toys.loss_function(model)
        optimizer = ZerothOrder(model, methods.lozo(directions_per="example"), lr=1e-3, forward_batching=forward_batching)
        tokens, labels = toys.batch(4)
        factor = torch.ones(4)
        optimizer.step(lambda b: loss(b[:2]) * b[2], (tokens, labels, factor))
        factor = torch.tensor([1.0, 1.0, poison, 1.0])
        optimizer.step(lambda b: loss(b[:2]) * b[2], (tokens, labels, factor))
        return optimizer

    clean, poisoned = run(1.0).last_report, run(math.nan).last_report
    assert poisoned.skipped == (False, False, True, False)
    assert float(poisoned.coefficients[2]) == 0 and math.isfinite(poisoned.loss)
    kept = [0, 1, 3]
    assert torch.allclose(poisoned.coefficients[kept], clean.coefficients[kept])


@EACH
@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_the_evaluations_of_a_batch_that_a_step_makes(options, estimator):
    """Two, whatever the number of directions, if an example has one; m directions cost 2m, or m + 1 where they share that at θ."""
    model = toys.classifier()
    method = methods.lozo(estimator=estimator, **options)
    optimizer = ZerothOrder(model, method, lr=1e-3)
    optimizer.step(toys.loss_function(model), toys.batch(6))
    count = 2 if options is not TWO else 4 if estimator == "central" else 3
    assert method.forwards_per_step == optimizer.forward_passes == count and optimizer.sequences_evaluated == 6 * count
    assert all(not coordinate.drawn for coordinate in optimizer.forward.coordinates)


def test_the_last_batch_may_be_smaller():
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.lozo(directions_per="group", group_size=2), lr=1e-3)
    for size, directions in ((8, 4), (5, 2), (2, 1), (1, 1)):
        optimizer.step(toys.loss_function(model), toys.batch(size))
        assert len(optimizer.last_report.coefficients) == directions


@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "mezo-momentum", "lozo", "lozo-m", "lozo-e"])
def test_learns(name):
    rate = {"mezo": 3e-2, "mezo-momentum": 3e-3, "mezo-adam": 1e-2}.get(name, 3e-2)
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.get(name, num_directions=1, directions_per="example"), lr=rate)
    losses = [float(optimizer.step(toys.loss_function(model), toys.batch(seed=step))) for step in range(300)]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: methods.lozo(num_directions="example"), "num_directions must be a whole number of at least 1, not 'example'"),
        (lambda m: methods.lozo(directions_per="exmaple"), "unknown directions_per 'exmaple'; did you mean 'example'?"),
        (lambda m: methods.lozo(directions_per="group"), "needs group_size, the examples per group: at least 2"),
        (lambda m: methods.lozo(directions_per="group", group_size=0), "group_size must be a whole number of at least 1, not 0"),
        (lambda m: methods.lozo(group_size=4), "group_size=4 needs directions_per='group', not 'batch'"),
        (
            lambda m: ZerothOrder(m, methods.lozo(directions_per="example")).step(lambda b: toys.loss_function(m)(b).mean(), toys.batch()),
            "needs one loss per example, and the loss function returned shape",
        ),
        (lambda m: ZerothOrder(m, methods.lozo(directions_per="example")).step(lambda: torch.zeros(3)), "a closure has no batch"),
    ],
)
def test_where_it_is_impossible_one_sentence_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call(toys.classifier())


def test_matrices_in_full_space_are_slow_but_right_and_said_so():
    torch.manual_seed(0)
    model, x = nn.Linear(80, 70), torch.randn(3, 80)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="perturbs weight, a weight of shape .70, 80. that is trained in full space, once for each"):
        optimizer = ZerothOrder(model, methods.mezo(directions_per="example"), lr=0.0)
    optimizer.step(lambda rows: model(rows).square().mean(dim=1), x)
    expected = []
    for row in range(3):
        losses = []
        for sign in (1, -1):
            offset = Offset(sign * optimizer.eps, 0, 0, row)
            weights = {c.name: c.at(optimizer.directions, offset) for c in optimizer.run.state.every_coordinate()}
            losses.append(torch.func.functional_call(model, weights, x[row]).square().mean())
        expected.append((losses[0] - losses[1]).detach() / (2 * optimizer.eps))
    assert torch.allclose(optimizer.last_report.coefficients, torch.stack(expected), rtol=1e-2)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
