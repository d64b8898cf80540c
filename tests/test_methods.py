"""Every method passes the same tests, whatever it is made of."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods
from zotune.directions import Directions, Key
from zotune.journal import StepRecord
from zotune.subspaces import LowRankCoordinate

#: Learning rates for the toy problems, found on the grid 1e-3, 3e-3, 1e-2, 3e-2, 1e-1.
RATES = {"mezo": 3e-2, "mezo-momentum": 3e-3, "mezo-adam": 1e-2, "lozo": 3e-2, "lozo-m": 3e-2, "lozo-e": 3e-2}

every_method = pytest.mark.parametrize("name", methods.names())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def short_interval(name: str, **options) -> methods.Method:
    return methods.get(name, **({"interval": 7} if "interval" in methods.options(name) else {}), **options)


def run(model: nn.Module, optimizer: ZerothOrder, first: int, last: int) -> list[float]:
    return [float(optimizer.step(toys.loss_function(model), toys.batch(seed=step))) for step in range(first, last)]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@every_method
def test_converges_on_a_quadratic(name):
    target = torch.linspace(-1, 1, 60).view(10, 6)
    model = nn.Linear(6, 10, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = ZerothOrder(model, short_interval(name, num_directions=4), lr=RATES[name])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 600)

    def loss(eye):
        return (model(eye).T - target).detach().square().sum().div(2)

    begin = float(loss(torch.eye(6)))
    for _ in range(600):
        optimizer.step(loss, torch.eye(6))
        schedule.step()
    assert float(loss(torch.eye(6))) < 0.2 * begin


@every_method
def test_learns_a_small_classification_problem(name):
    model = toys.classifier()
    optimizer = ZerothOrder(model, short_interval(name, num_directions=4), lr=RATES[name])
    losses = run(model, optimizer, 0, 300)
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


@every_method
@every_dtype
def test_every_parameter_moves_and_no_grad_appears(name, dtype):
    model = toys.classifier(dtype)
    before = copy.deepcopy(model)
    run(model, ZerothOrder(model, short_interval(name), lr=1e-1), 0, 10)
    state = model.state_dict()
    for key, parameter in before.named_parameters():
        assert not torch.equal(state[key], parameter), key
    assert all(parameter.grad is None for parameter in model.parameters())


@every_method
def test_the_same_run_twice_is_equal_bit_for_bit(name):
    models = [toys.classifier(), toys.classifier()]
    losses = [run(m, ZerothOrder(m, short_interval(name), lr=1e-2, seed=3), 0, 20) for m in models]
    assert losses[0] == losses[1] and equal(*models)


@every_method
@every_dtype
@pytest.mark.parametrize("stop", [5, 7, 10])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(name, dtype, stop):
    straight, halted = toys.classifier(dtype), toys.classifier(dtype)
    optimizer = ZerothOrder(straight, short_interval(name), lr=1e-2, weight_decay=0.1)
    losses = run(straight, optimizer, 0, 20)

    first = ZerothOrder(halted, short_interval(name), lr=1e-2, weight_decay=0.1)
    run(halted, first, 0, stop)
    weights, state = copy.deepcopy(halted.state_dict()), copy.deepcopy(first.state_dict())
    resumed = toys.classifier(dtype)
    resumed.load_state_dict(weights)
    second = ZerothOrder(resumed, short_interval(name), lr=1e-2, weight_decay=0.1)
    second.load_state_dict(state)
    assert run(resumed, second, stop, 20) == losses[stop:]
    assert equal(straight, resumed)
    assert second.forward_passes == optimizer.forward_passes


@every_method
def test_saving_does_not_change_the_run(name):
    models = [toys.classifier(torch.bfloat16), toys.classifier(torch.bfloat16)]
    optimizers = [ZerothOrder(m, short_interval(name), lr=1e-2) for m in models]
    for step in range(15):
        run(models[0], optimizers[0], step, step + 1)
        run(models[1], optimizers[1], step, step + 1)
        models[1].state_dict(), optimizers[1].state_dict()
    assert equal(*models)


@every_method
def test_between_steps_the_model_computes_with_what_state_dict_holds(name):
    model = toys.classifier()
    optimizer = ZerothOrder(model, short_interval(name), lr=1e-1)
    run(model, optimizer, 0, 10)
    plain = toys.classifier()
    plain.load_state_dict(model.state_dict())
    x = toys.batch()[0]
    live = model(x)
    assert torch.allclose(live, plain(x), atol=1e-5)
    optimizer.detach()
    assert torch.allclose(live, model(x), atol=1e-5) and equal(model, plain)
    assert not any(module._forward_hooks for module in model.modules())


@every_method
def test_loading_weights_forgets_what_was_pending(name):
    model = toys.classifier()
    start = copy.deepcopy(model.state_dict())
    run(model, ZerothOrder(model, short_interval(name), lr=1e-1), 0, 10)
    model.load_state_dict(start)
    x = toys.batch()[0]
    assert torch.equal(model(x), toys.classifier()(x))


@every_method
@every_dtype
def test_state_stays_within_what_is_declared(name, dtype):
    model = nn.Sequential(nn.Embedding(60, 32), nn.Linear(32, 40), nn.LayerNorm(40), nn.Linear(40, 60)).to(dtype)
    method = methods.get(name)
    optimizer = ZerothOrder(model, method, lr=1e-2)
    for _ in range(3):
        optimizer.step(lambda ids: model(ids).float().mean(dim=1), torch.arange(8))
    held = {id(t): t for t in optimizer.rule.state()[0].values() if t.dim()}
    for coordinate in optimizer.probe.coordinates:
        if isinstance(coordinate, LowRankCoordinate):
            held |= {id(t): t for t in (coordinate.a, coordinate.v)}
            assert coordinate.drawn is None
        elif (residual := coordinate.state().get("residual")) is not None:
            held[id(residual)] = residual
    shapes = [tuple(p.shape) for p in model.parameters()]
    declared = method.state_bytes(shapes, half=dtype != torch.float32)
    assert sum(t.numel() * t.element_size() for t in held.values()) == declared


@every_method
def test_a_loss_that_is_not_finite_is_skipped_and_said(name, tmp_path):
    model = toys.classifier()
    optimizer = ZerothOrder(model, short_interval(name), lr=1e-2, journal=tmp_path / "j")
    run(model, optimizer, 0, 3)
    before = copy.deepcopy(model.state_dict())
    optimizer.step(lambda batch: toys.loss_function(model)(batch) * math.nan, toys.batch())
    assert all(optimizer.last.skipped) and not optimizer.last.coefficients.any()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [set(r.skipped) for r in optimizer.journal.records() if not isinstance(r, dict)] == [{False}] * 3 + [{True}]
    run(model, optimizer, 4, 6)
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@every_method
@pytest.mark.parametrize("build", [lambda: nn.LayerNorm(6), lambda: nn.Linear(6, 6, bias=False)], ids=["vectors", "matrix"])
def test_models_of_vectors_only_and_of_matrices_only_learn(name, build):
    model = build()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    optimizer = ZerothOrder(model, short_interval(name, num_directions=4), lr=RATES[name])

    def loss(x):
        return (model(x) - 2 * x.flip(1)).square().mean(dim=1)

    losses = [float(optimizer.step(loss, x)) for _ in range(200)]
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("num_directions", [1, 3])
def test_lozo_updates_along_the_direction_it_perturbed_on_every_step(rank, num_directions):
    """ΔW = −η (1/K) Σ c_k U_k Vᵀ / r with the U_k and V of the evaluation, redraw steps included."""
    model = nn.Linear(6, 5, bias=False)
    seen: list[torch.Tensor] = []

    def loss(x):
        seen.append(model(torch.eye(6)).T.clone())  # the weights this evaluation computed with
        return model(x).square().mean(dim=1)

    eps, lr, x = 1e-1, 1e-2, torch.ones(4, 6)
    optimizer = ZerothOrder(model, methods.lozo(rank=rank, interval=4, eps=eps, num_directions=num_directions), lr=lr, probe="sequential")
    optimizer.step(loss, x)
    for _ in range(1, 14):
        before = model.state_dict()["weight"].clone()
        seen.clear()
        optimizer.step(loss, x)
        change = model.state_dict()["weight"] - before
        expected = torch.zeros_like(change)
        for k, c in enumerate(optimizer.last.coefficients.tolist()):
            direction = (seen[2 * k] - seen[2 * k + 1]) / (2 * eps)  # U_k Vᵀ as it was evaluated
            assert torch.linalg.matrix_rank(direction, rtol=1e-4) <= rank
            expected -= lr * c / num_directions * direction / rank
        assert torch.allclose(change, expected, atol=2e-6)


def test_lozo_m_transports_its_momentum_at_a_redraw():
    """N ← N V_oldᵀ V_new / n at the redraw, then N ← βN + (1 − β) c U."""
    model = nn.Linear(6, 5, bias=False)
    optimizer = ZerothOrder(model, methods.lozo_m(rank=2, interval=3, momentum=0.9), lr=1e-2)
    coordinate = optimizer.probe.coordinates[0]

    def loss(x):
        return model(x).square().mean(dim=1)

    for _ in range(3):
        optimizer.step(loss, torch.ones(4, 6))
    old, v_old = optimizer.rule.state()[0]["weight/exp_avg"].clone(), coordinate.v.clone()
    optimizer.step(loss, torch.ones(4, 6))
    assert not torch.equal(coordinate.v, v_old)
    u = Directions("gaussian").draw(Key(0, 3, 0, "weight"), (5, 2))
    expected = 0.9 * old @ v_old.T @ coordinate.v / 6 + 0.1 * float(optimizer.last.coefficients) * u
    assert torch.allclose(optimizer.rule.state()[0]["weight/exp_avg"], expected, atol=1e-6)


@pytest.mark.parametrize("name", methods.names())
def test_1000_bfloat16_steps_at_rate_zero_leave_every_weight_unchanged(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    before = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.get(name), lr=0.0)
    for _ in range(1000):
        optimizer.step(lambda x: model(x).float().mean(dim=1), torch.ones(2, 8, dtype=torch.bfloat16))
    optimizer.detach()
    assert equal(model, before)


@pytest.mark.parametrize("name", ["mezo", "lozo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_200_updates_far_below_the_spacing_add_up(name, dtype):
    """Updates of 1e-6 z on weights of size 0.02: their sum is kept with cosine ≥ 0.99 (rounding in place keeps 0.15)."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.normal_(model.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    model.to(dtype)
    interval = {"interval": 1000} if name == "lozo" else {}
    optimizer = ZerothOrder(model, methods.get(name, **interval), lr=1e-6)
    coordinate = optimizer.probe.coordinates[0]
    truth = torch.zeros(coordinate.shape)
    for step in range(200):
        optimizer.apply(StepRecord(step, (1e-6,), 0.0, (1.0,), (False,)))
        truth -= 1e-6 * coordinate.lr_scale * Directions("gaussian").draw(Key(0, step, 0, "weight"), coordinate.shape)
    start = nn.Linear(64, 64, bias=False)
    nn.init.normal_(start.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    kept = coordinate.value().detach() - (start.weight.detach().to(dtype).float() if name == "mezo" else 0)
    assert float(torch.nn.functional.cosine_similarity(kept.flatten(), truth.flatten(), dim=0)) > 0.999


def test_without_a_residual_those_updates_are_lost():
    """The test above can fail: the same updates added in place to bfloat16 weights keep a cosine below 0.5."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(64, 64, generator=generator)).bfloat16()
    start, truth = weight.float(), torch.zeros(64, 64)
    for _ in range(200):
        z = torch.randn(64, 64, generator=generator)
        weight += (1e-6 * z).bfloat16()
        truth += 1e-6 * z
    kept = weight.float() - start
    assert float(torch.nn.functional.cosine_similarity(kept.flatten(), truth.flatten(), dim=0)) < 0.5


def test_the_core_imports_torch_alone():
    """Law 7."""
    core = "directions precision coordinates subspaces side_path stacking stacked_parameters estimators rules probe journal methods"
    core += " evaluating calibration run_state optimizer replaying"
    code = "import sys; " + "; ".join(f"import zotune.{name}" for name in core.split())
    code += "; sys.exit(any(name in sys.modules for name in ('transformers', 'peft', 'accelerate', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every_method
def test_every_method_says_what_it_is(name):
    method = methods.get(name)
    assert method.name == name and method.title and method.extra_memory
    assert method.arxiv in (methods.recipe(name).__doc__ or "")
    assert method.options == methods.options(name)
    assert methods.get(name, **method.options) == method


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.get("lozzo"), "unknown method 'lozzo'; did you mean 'lozo'"),
        (lambda: methods.get("lozo", rnak=3), "has no option 'rnak'; did you mean 'rank'"),
        (lambda: methods.get("mezo", rank=3), "method 'mezo' has no option 'rank'"),
        (lambda: methods.lozo(rank=0), "rank must be a whole number of at least 1"),
        (lambda: methods.mezo(eps=0.0), "eps must be a positive number"),
        (lambda: methods.mezo(num_directions=0), "num_directions must be"),
        (lambda: methods.mezo(direction="gausian"), "did you mean 'gaussian'"),
        (lambda: methods.mezo(estimator="middle"), "unknown estimator 'middle'"),
    ],
)
def test_bad_options_get_one_sentence_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
