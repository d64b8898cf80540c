"""Half-precision weights that every step writes: stochastic rounding by default, an exact residual as an option (law 3)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import zotune
from zotune import ZerothOrder, methods
from zotune.optim.journal_records import StepRecord
from zotune.rng.directions import Directions, Key
from zotune.subspaces.coordinate import THIN
from zotune.subspaces.full import rounding_key
from zotune.weights.precision import HALF, stochastic_round

SIDE = 2 * THIN  # a matrix that is not thin


def layer(dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    model = nn.Linear(SIDE, SIDE, bias=bias)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.to(dtype)


def updates(model: nn.Module, steps: int, rate: float, **options) -> torch.Tensor:
    """The exact sum of ``steps`` updates −rate · Z of the layer's weight, which the model takes too."""
    optimizer = ZerothOrder(model, methods.mezo(**options), lr=rate)
    total = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for step in range(steps):
        optimizer.apply(StepRecord(step, (rate,), 0.0, (1.0,), (False,)))
        total -= rate * Directions("gaussian").draw(Key(0, step, 0, "weight"), (SIDE, SIDE)).double()
    return total


@pytest.mark.parametrize("dtype", HALF)
def test_200_updates_below_the_spacing_are_kept_on_average(dtype):
    """The share of the exact sum that is kept is 1, and the mean error 0, to five standard deviations (of at most √(|u| s) an update)."""
    model = layer(dtype)
    start = model.weight.detach().double().clone()
    exact = updates(model, 200, 1e-6)
    spacing = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(start.abs() + 0.005))  # not below that at the weight, later on
    variance = 200 * 1e-6 * spacing
    error = model.weight.detach().double() - start - exact
    norm = float((exact**2).sum())
    assert abs(float((error * exact).sum()) / norm) < 5 * float((variance * exact**2).sum()) ** 0.5 / norm
    assert abs(float(error.mean())) < 5 * float(variance.mean() / error.numel()) ** 0.5
    assert float(error.std()) < 1.2 * float(variance.mean()) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
def test_with_a_residual_200_such_updates_are_kept_exactly(dtype):
    model = layer(dtype)
    start = model.weight.detach().double().clone()
    optimizer = ZerothOrder(model, methods.mezo(rounding="residual"), lr=1e-6)
    total = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for step in range(200):
        optimizer.apply(StepRecord(step, (1e-6,), 0.0, (1.0,), (False,)))
        total -= 1e-6 * Directions("gaussian").draw(Key(0, step, 0, "weight"), (SIDE, SIDE)).double()
    kept = optimizer.forward.coordinates[0].value().double() - start
    assert float(torch.nn.functional.cosine_similarity(kept.flatten(), total.flatten(), dim=0)) > 0.999


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounding", ["stochastic", "residual"])
def test_steps_at_rate_zero_change_no_weight(dtype, rounding):
    model = layer(dtype, bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    updates(model, 50, 0.0, rounding=rounding)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", HALF)
def test_an_update_along_several_directions_is_rounded_once(dtype):
    model = layer(dtype)
    expected = model.weight.detach().float().flatten()
    optimizer = ZerothOrder(model, methods.mezo(num_directions=3), lr=3.0)
    coefficients = (1e-6, -2e-6, 3e-6)
    optimizer.apply(StepRecord(0, (3.0,), 0.0, coefficients, (False,) * 3))
    for direction, coefficient in enumerate(coefficients):
        z = Directions("gaussian").draw(Key(0, 0, direction, "weight"), (SIDE * SIDE,))
        expected = expected - z * (3.0 / 3 * float(torch.tensor(coefficient)))
    found = stochastic_round(expected, dtype, rounding_key(0, 0, "weight")).view(SIDE, SIDE)
    different = (found != model.weight).float().mean()  # the last bit of a float32 sum may decide a rounding
    assert float(different) < 1e-3


@pytest.mark.parametrize(("rounding", "bytes_each"), [("stochastic", 0), ("residual", 2)])
def test_only_residuals_take_memory(rounding, bytes_each):
    model = layer(torch.bfloat16, bias=True)
    method = methods.mezo(rounding=rounding)
    optimizer = ZerothOrder(model, method, lr=1e-6)
    kept = sum(tensor.numel() * tensor.element_size() for c in optimizer.forward.coordinates for tensor in c.kept())
    shapes = [parameter.shape for parameter in model.parameters()]
    assert kept == method.state_bytes(shapes, half=True) == bytes_each * SIDE * SIDE + 2 * SIDE  # the bias has residuals always
    assert method.state_bytes(shapes) == 0


@pytest.mark.parametrize("rounding", ["stochastic", "residual"])
@pytest.mark.parametrize("method", ["mezo", "mezo-adam", "hizoo", "zo-block", "sparse-mezo"])
def test_a_half_precision_run_replays_and_resumes_bit_for_bit(method, rounding, tmp_path):
    def model_of() -> nn.Module:
        return nn.Sequential(layer(torch.bfloat16, bias=True), nn.LayerNorm(SIDE), layer(torch.bfloat16)).bfloat16()

    x = torch.randn(4, SIDE, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run(model: nn.Module, optimizer: ZerothOrder, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(lambda batch: (model(batch).float() - 1).pow(2).mean(dim=1), x)
            model(x)

    options = {"unit": "linear"} if method == "zo-block" else {}
    make = lambda: methods.get(method, rounding=rounding, **options)  # noqa: E731
    whole, journal = model_of(), tmp_path / "journal.zo"
    optimizer = ZerothOrder(whole, make(), lr=1e-5, seed=5, journal=journal)
    run(whole, optimizer, 6)
    optimizer.remove_hooks()
    replayed = model_of()
    zotune.replay(replayed, journal)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), replayed.parameters(), strict=True))

    resumed = model_of()
    first = ZerothOrder(resumed, make(), lr=1e-5, seed=5)
    run(resumed, first, 3)
    weights, state = {k: v.clone() for k, v in resumed.state_dict().items()}, first.state_dict()
    first.remove_hooks()
    resumed = model_of()
    resumed.load_state_dict(weights)
    second = ZerothOrder(resumed, make(), lr=1e-5, seed=5)
    second.load_state_dict(state)
    run(resumed, second, 3)
    second.remove_hooks()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.mezo(rounding="nearest"), "unknown rounding 'nearest'; choose one of stochastic, residual"),
        (lambda: methods.lozo(rounding="residual"), "lozo writes no weight of the model at each step"),
        (lambda: methods.get("sensitive-mezo", rounding="residual"), "has no option 'rounding'"),
    ],
)
def test_a_rounding_without_effect_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_another_rounding_than_the_saved_one_is_refused():
    saved = ZerothOrder(layer(torch.bfloat16), methods.mezo(rounding="residual"), lr=1e-6)
    state = saved.state_dict()
    with pytest.raises(ValueError, match="rounding"):
        ZerothOrder(layer(torch.bfloat16), methods.mezo(), lr=1e-6).load_state_dict(state)


def test_the_bound_of_the_drift_can_fail():
    """Rounding to nearest loses the updates: the share that is kept is not 1."""
    weight = layer(torch.bfloat16).weight.detach()
    start, exact = weight.double(), torch.zeros(SIDE, SIDE, dtype=torch.float64)
    weight = weight.clone()
    for step in range(200):
        z = Directions("gaussian").draw(Key(0, step, 0, "weight"), (SIDE, SIDE))
        weight.add_((1e-6 * z).bfloat16())
        exact += 1e-6 * z.double()
    spacing = torch.finfo(torch.bfloat16).eps * 2.0 ** torch.floor(torch.log2(start.abs() + 0.005))
    error, norm = weight.double() - start - exact, float((exact**2).sum())
    bound = 5 * math.sqrt(float((200 * 1e-6 * spacing * exact**2).sum())) / norm
    assert abs(float((error * exact).sum()) / norm) > bound
