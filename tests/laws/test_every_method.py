"""Every method of the registry passes the same tests, whatever it is made of.

What a method cannot do it says in a field of its own (``estimates``, ``reach``), and the tests hold it to that.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

import toys
from step_sizes import Slope, slope, step_size
from zotune import ZerothOrder, methods, replay
from zotune.optim.step_transforms import HistoryTransform
from zotune.subspaces.coordinate import Offset

every_method = pytest.mark.parametrize("name", toys.names())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])


@functools.cache
def classifier_slope(reach: str) -> Slope:
    model = toys.classifier()
    return slope(model, lambda: toys.loss_function(model)(toys.batch()).mean(), reach)


def build(name: str, dtype: torch.dtype = torch.float32, lr: float | None = None, **arguments) -> tuple[nn.Module, ZerothOrder]:
    model, method = toys.classifier(dtype), toys.method(name)
    return model, ZerothOrder(model, method, lr=step_size(method, classifier_slope(method.reach)) if lr is None else lr, **arguments)


def run(model: nn.Module, optimizer: ZerothOrder, first: int, last: int) -> list[float]:
    return [float(optimizer.step(toys.loss_function(model), toys.batch(seed=step))) for step in range(first, last)]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- learning --------------------------------------------------------------------------------------------------------------------------


def learn(model: nn.Module, optimizer: ZerothOrder, loss_of: Callable, batches: Iterable, every: int = 1) -> list[float]:
    """The loss of each step, whose learning rate is that of theory, computed anew after ``every`` steps."""
    same, losses = copy.deepcopy(model), []
    for step, batch in enumerate(batches):
        if step % every == 0:
            same.load_state_dict(model.state_dict())
            at = slope(same, lambda batch=batch: loss_of(same)(batch).mean(), optimizer.method.reach)
            if at.square > 1e-12:  # else the minimum is reached
                optimizer.param_groups[0]["lr"] = step_size(optimizer.method, at, step, optimizer.run.shaping_state)
        losses.append(float(optimizer.step(loss_of(model), batch).mean()))
    return losses


@every_method
def test_contracts_a_quadratic_as_theory_says(name):
    """½ ‖θ − θ*‖² in 30 dimensions: after these steps of plain SGD a thousandth of it is left on average."""
    method = toys.method(name, num_directions=4, directions_per="batch", interval=2)
    target = torch.linspace(-1, 1, 30).view(6, 5)
    if method.reach == "rows":
        target = target.mean(dim=1, keepdim=True).expand(6, 5)
    model = nn.Linear(5, 6, bias=False)
    nn.init.zeros_(model.weight)
    if method.reach == "part":  # small weights, and those that the gradient is largest in, are the ones to be changed
        start = torch.linspace(-3, 3, 30).view(6, 5)
        model.weight.data.copy_(start)
        target = torch.where(start.abs() < 0.65, -start, start)
    fresh = copy.deepcopy(model)
    optimizer = ZerothOrder(model, method, lr=1.0)
    if method.reach == "span":  # the subspace that the run will move in
        same = copy.deepcopy(model)
        looking = ZerothOrder(same, method, lr=0.0)
        looking.step(lambda eye: same(eye).square().sum(), torch.eye(5))
        (coordinate,) = looking.forward.coordinates
        core = torch.linspace(-0.2, 0.2, coordinate.numel).view(coordinate.shape)
        target = coordinate.expand(core) @ coordinate.v.T

    def loss_of(model):
        return lambda eye: (model(eye).T - target).square().sum().div(2)

    times = 1 if method.kernel is None else 2  # its noise asks for shorter steps: of 6.25 times as many, as many as there is time for
    steps = times * math.ceil(math.log(1000) / (0.75 / (1 + 31 / method.num_directions)))
    learn(model, optimizer, loss_of, [torch.eye(5)] * steps, every=times)
    with torch.no_grad():
        left = float(loss_of(model)(torch.eye(5)) / loss_of(fresh)(torch.eye(5)))
    assert left < (0.01 if plain_gaussian(method) else 0.3)


def plain_gaussian(method: methods.Method) -> bool:
    """Whether theory is about the method itself: plain SGD on unbiased estimates along Gaussian directions in full space."""
    beyond = method.shaping or method.kernel or method.history or method.svrg or method.projection or method.update_rule_args
    plain = method.fitness == "loss" and not beyond
    return plain and method.estimates == "gradient" and method.update_rule == "SGD" and method.subspace.full


@every_method
def test_learns_a_small_classification_problem(name):
    model = toys.classifier()
    optimizer = ZerothOrder(model, toys.method(name, num_directions=4, directions_per="batch"), lr=1.0)
    steps = 60 if optimizer.method.reach == "all" else 200
    losses = learn(model, optimizer, toys.loss_function, (toys.batch(seed=step) for step in range(steps)), every=20)
    assert sum(losses[-20:]) < (0.95 if optimizer.method.reach == "all" else 0.97) * sum(losses[:20])


@every_method
@pytest.mark.parametrize("build", [lambda: nn.LayerNorm(6), lambda: nn.Linear(6, 6, bias=False)], ids=["vectors", "matrix"])
def test_models_of_vectors_only_and_of_matrices_only_learn(name, build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    optimizer = ZerothOrder(model, toys.method(name, num_directions=4, directions_per="batch"), lr=1.0)
    losses = learn(model, optimizer, lambda model: lambda x: (model(x) - 2 * x.flip(1)).square().mean(dim=1), [x] * 60, every=10)
    assert losses[-1] < 0.98 * losses[0]


@every_method
def test_the_estimate_is_of_the_gradient_what_the_method_says(name):
    """On a linear loss, over many keys, to 5 standard errors: its mean is the gradient, a multiple of it, or at least points downhill."""
    method = toys.method(name, num_directions=16, directions_per="batch", interval=1)
    shared = not method.own and method.num_directions > 1
    model = nn.Linear(4, 3)
    slopes = [torch.linspace(-1, 2, 12).view(3, 4), torch.tensor([0.5, -1.0, 1.5])]
    parameters = list(model.parameters())
    optimizer = ZerothOrder(model, method, lr=1e-6)
    points = torch.cat([torch.eye(4), torch.zeros(1, 4)])

    def loss():
        out = model(points)  # the columns of the weight, plus the bias; and the bias
        return ((out[:4] - out[4]) * slopes[0].T).sum() + (out[4] * slopes[1]).sum()

    estimates = []
    noisy = ("lozo-e", "lozo-g", "mezo-svrg")
    for _step in range((60 if name in noisy else 30) if shared else 200):
        optimizer.step(loss)
        if not optimizer.last_report.terms:  # looked, and did not move
            continue
        estimate = []
        for parameter in parameters:
            (coordinate,) = (c for c in optimizer.forward.coordinates if c.parameter is parameter)
            here, total = coordinate.at(optimizer.directions, None), torch.zeros_like(parameter)
            for term in optimizer.last_report.terms:
                for k, c in enumerate(term.coefficients):
                    move = coordinate.at(optimizer.directions, Offset(1.0, 0, term.step, k)) - here
                    total += c / len(term.coefficients) * move
            estimate.append(coordinate.lr_scale * total.flatten())
            coordinate.drop()
        estimates.append(torch.cat(estimate))
    found, gradient = torch.stack(estimates).detach().double(), torch.cat([slope.flatten() for slope in slopes]).double()
    along = found @ gradient / gradient.square().sum()
    scale = float(along.mean())
    assert scale > 5 * float(along.std()) / math.sqrt(len(found))
    if method.estimates != "descent":
        apart = found.mean(dim=0) - (1.0 if method.estimates == "gradient" else scale) * gradient
        assert bool((apart.abs() < 5 * found.std(dim=0) / math.sqrt(len(found))).all())


# -- laws ------------------------------------------------------------------------------------------------------------------------------


@every_method
@every_dtype
def test_every_parameter_moves_and_no_grad_appears(name, dtype):
    model, optimizer = build(name, dtype, lr=1e2 if name == "randopt" else 1e-1)  # whose steps are η ε long
    before = copy.deepcopy(model)
    run(model, optimizer, 0, 10)
    state = model.state_dict()
    for key, parameter in before.named_parameters():
        assert not torch.equal(state[key], parameter), key
    assert all(parameter.grad is None for parameter in model.parameters())


@every_method
def test_what_moves_is_what_the_method_says(name):
    """A method that reaches rows only moves each row of a matrix by one number."""
    model = nn.Linear(6, 5, bias=False)
    before = model.weight.detach().clone()
    optimizer = ZerothOrder(model, toys.method(name), lr=1e-2)
    for _ in range(8):
        optimizer.step(lambda x: model(x).square().mean(dim=1), torch.linspace(-1, 2, 24).view(4, 6))
    change = model.state_dict()["weight"] - before
    assert torch.allclose(change, change[:, :1].expand(5, 6), atol=1e-6) == (optimizer.method.reach == "rows")


@every_method
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 0), (torch.float32, 3), (torch.bfloat16, 0), (torch.float16, 3)])
def test_no_evaluation_writes_a_weight(name, dtype, steps):
    model, optimizer = build(name, dtype)
    run(model, optimizer, 0, steps)
    parameters = [p.data for p in model.parameters()]
    before = [p.clone() for p in parameters]
    seen = []

    def watching(batch):
        seen.append(all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True)))
        return toys.loss_function(model)(batch)

    optimizer.step(watching, toys.batch())
    assert seen and all(seen)


@every_method
def test_the_same_run_twice_is_equal_bit_for_bit(name):
    runs = [build(name, seed=3) for _ in range(2)]
    state = torch.get_rng_state()
    losses = [run(*each, 0, 15) for each in runs]
    assert losses[0] == losses[1] and equal(runs[0][0], runs[1][0])
    assert torch.equal(state, torch.get_rng_state())


#: Steps of a run that is stopped on the way: beyond the second interval of :data:`toys.SHORT`.
LAST = 15


@functools.lru_cache(maxsize=8)
def straight_run(name: str, dtype: torch.dtype) -> tuple[list[float], nn.Module, int]:
    """Losses, model and forward passes of an undisturbed run."""
    model, optimizer = build(name, dtype, weight_decay=0.1)
    return run(model, optimizer, 0, LAST), model, optimizer.forward_passes


@every_method
@pytest.mark.parametrize(("dtype", "stop"), [(torch.float32, 5), (torch.bfloat16, 7), (torch.bfloat16, 10)])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(name, dtype, stop):
    losses, trained, forward_passes = straight_run(name, dtype)
    halted, first = build(name, dtype, weight_decay=0.1)
    run(halted, first, 0, stop)
    weights, state = copy.deepcopy(halted.state_dict()), copy.deepcopy(first.state_dict())
    resumed, second = build(name, dtype, weight_decay=0.1)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    assert run(resumed, second, stop, LAST) == losses[stop:]
    assert equal(trained, resumed)
    assert second.forward_passes == forward_passes


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_journal_replays_bit_for_bit(name, dtype, tmp_path):
    model, optimizer = build(name, dtype, weight_decay=0.1, journal=tmp_path / "j")
    run(model, optimizer, 0, 8)
    optimizer.step(lambda batch: toys.loss_function(model)(batch) * math.nan, toys.batch())
    run(model, optimizer, 9, 16)
    rebuilt = toys.classifier(dtype)
    again = replay(rebuilt, tmp_path / "j", method=optimizer.method)
    assert equal(model, rebuilt)
    assert [transform.state() for transform in again.run.transforms] == [transform.state() for transform in optimizer.run.transforms]


@every_method
def test_micro_batches_are_one_batch(name):
    tokens, labels = toys.batch(12)
    (whole, first), (parts, second) = build(name, lr=1e-4), build(name, lr=1e-4)
    for _ in range(2):
        a = first.step(toys.loss_function(whole), (tokens, labels))
        b = second.step(toys.loss_function(parts), [(tokens[:4], labels[:4]), (tokens[4:], labels[4:])])
        assert torch.allclose(a, b, atol=1e-5)
    assert first.sequences_evaluated == second.sequences_evaluated


@every_method
def test_saving_does_not_change_the_run(name):
    (plain, first), (saved, second) = build(name, torch.bfloat16), build(name, torch.bfloat16)
    for step in range(10):
        run(plain, first, step, step + 1)
        run(saved, second, step, step + 1)
        saved.state_dict(), second.state_dict()
    assert equal(plain, saved)


@every_method
def test_between_steps_the_model_computes_with_its_state_dict(name):
    model, optimizer = build(name)
    run(model, optimizer, 0, 10)
    plain = toys.classifier()
    plain.load_state_dict(model.state_dict())
    x = toys.batch()[0]
    live = model(x)
    assert torch.allclose(live, plain(x), atol=1e-5)
    optimizer.remove_hooks()
    assert torch.allclose(live, model(x), atol=1e-5) and equal(model, plain)
    assert not any(module._forward_hooks for module in model.modules())


@every_method
def test_loading_weights_forgets_what_was_pending(name):
    model, optimizer = build(name, lr=1e-1)
    start = copy.deepcopy(model.state_dict())
    run(model, optimizer, 0, 10)
    model.load_state_dict(start)
    x = toys.batch()[0]
    assert torch.equal(model(x), toys.classifier()(x))


@every_method
@every_dtype
def test_state_stays_within_what_is_declared(name, dtype):
    model = nn.Sequential(nn.Embedding(60, 32), nn.Linear(32, 40), nn.LayerNorm(40), nn.Linear(40, 60)).to(dtype)
    method = toys.method(name, num_directions=4, directions_per="batch", rank=2)
    optimizer = ZerothOrder(model, method, lr=1e-4)
    for _ in range(3):
        optimizer.step(lambda ids: model(ids).float().mean(dim=1), torch.arange(8))
    held = {id(t): t for t in optimizer.rule.state()[0].values() if t.dim()}
    for transform in optimizer.run.transforms:
        held |= {id(t): t for t in transform.tensors().values()}
    for coordinate in optimizer.forward.coordinates:
        held |= {id(t): t for t in coordinate.kept()}
        assert not coordinate.drawn
    shapes = [tuple(p.shape) for p in model.parameters()]
    declared = method.state_bytes(shapes, half=dtype != torch.float32)
    assert sum(t.numel() * t.element_size() for t in held.values()) == declared
    history = optimizer.run.transform(HistoryTransform)
    scalars = len(optimizer.run.shaping_state) + sum(len(past.coefficients) for past in (history.past if history else ()))
    assert scalars <= method.scalars


@every_method
def test_a_loss_that_is_not_finite_is_skipped_and_said(name, tmp_path):
    model, optimizer = build(name, journal=tmp_path / "j")
    run(model, optimizer, 0, 3)
    before = copy.deepcopy(model.state_dict())
    optimizer.step(lambda batch: toys.loss_function(model)(batch) * math.nan, toys.batch())
    assert all(optimizer.last_report.skipped) and not optimizer.last_report.coefficients.any()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [set(r.skipped) for r in optimizer.journal.records() if not isinstance(r, dict)] == [{False}] * 3 + [{True}]
    run(model, optimizer, 4, 6)
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@every_method
def test_bfloat16_steps_at_rate_zero_change_no_weight(name):
    model, optimizer = build(name, torch.bfloat16, lr=0.0)
    before = copy.deepcopy(model)
    run(model, optimizer, 0, 30)
    optimizer.remove_hooks()
    assert equal(model, before)


@every_method
def test_a_step_makes_the_forwards_that_are_declared(name):
    model = toys.classifier()
    method = methods.get(name)
    optimizer = ZerothOrder(model, method, lr=1e-4)
    evaluated = 0

    def counting(batch):
        nonlocal evaluated
        evaluated += len(batch[0])
        return toys.loss_function(model)(batch)

    optimizer.step(counting, toys.batch())  # the first compares ways of evaluating, and may measure
    evaluated, passes, sequences = 0, optimizer.forward_passes, optimizer.sequences_evaluated
    for _ in range(9):
        optimizer.step(counting, toys.batch())
    each = optimizer.method  # where every block of the model has directions of its own: of this model
    assert each.forwards_per_step == method.forwards_per_step * each.blocks
    forwards = [each.forwards(step) for step in range(10)]
    assert evaluated == sum(forwards[1:]) * 8 and max(forwards) == each.forwards_per_step
    assert optimizer.forward_passes - passes == sum(forwards[1:]) and optimizer.sequences_evaluated - sequences == evaluated


@every_method
def test_every_method_says_what_it_is(name):
    method = methods.get(name)
    assert method.name == name and method.title and method.extra_memory
    assert method.arxiv in (methods.recipe(name).__doc__ or "")
    assert "State" in (methods.recipe(name).__doc__ or "")
    assert method.options == methods.options(name)
    assert methods.get(name, **method.options) == method


@pytest.mark.parametrize(
    ("name", "forward_batching"), [*((name, "auto") for name in toys.names()), ("lozo", "sequential"), ("lozo-g", "sequential")]
)
def test_a_step_leaves_no_tensors_to_the_garbage_collector(name, forward_batching):
    """Tensors in circles of references stay until Python happens to look for them: memory that nobody has asked for."""
    model, optimizer = build(name, forward_batching=forward_batching)
    run(model, optimizer, 0, 3)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run(model, optimizer, 3, 6)
        gc.collect()
        assert not [thing for thing in gc.garbage if issubclass(type(thing), torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
