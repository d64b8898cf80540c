"""QES: quantized weights that change by whole numbers. What the other methods are held to in tests/laws, and the equation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods, replay
from zotune.rng.directions import Directions, Key, uniform_integers
from zotune.subspaces import CodeCoordinate
from zotune.weights.offload import offload
from zotune.weights.quantized_linear import QuantizedLinear, quantize

#: 8 bits of a small model: changes of a size that matters within a few steps.
FAST = {"eps": 0.05, "num_directions": 4}


def model(bits: int = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    return quantize(made.to(dtype), bits)


def offloaded() -> nn.Module:
    net = quantize(toys.transformer("llama"), 8)
    offload(net, "disk")
    return net


def run(net: nn.Module, optimizer: ZerothOrder, first: int, last: int) -> list[float]:
    return [float(optimizer.step(toys.loss_function(net), toys.batch(seed=step))) for step in range(first, last)]


def layers(net: nn.Module) -> dict[str, QuantizedLinear]:
    return {f"{name}.weight": layer for name, layer in net.named_modules() if isinstance(layer, QuantizedLinear)}


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def uniform(key: Key, shape: torch.Size) -> torch.Tensor:
    return uniform_integers(key, slice(0, math.prod(shape)), 24, torch.device("cpu")).view(shape) / 2.0**24


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_steps_are_the_equation(bits, most):
    """Integers and residuals of three steps, from losses evaluated on copies of the model whose integers are changed by hand."""
    sigma, gamma, lr, k = 0.7, 0.8, 0.3, 3
    net, reference = model(bits), model(bits)
    optimizer = ZerothOrder(net, methods.qes(eps=sigma, decay=gamma, num_directions=k), lr=lr, seed=5)
    ours = layers(reference)
    q = {name: layer.integers().double() for name, layer in ours.items()}
    e = {name: (uniform(Key(5, 0, 0, name, "residual"), values.shape) - 0.5).half().double() for name, values in q.items()}
    dropped = 0
    for step in range(3):
        changes, losses = [], []
        for j in range(k):
            found = {}
            for name, values in q.items():
                key = Key(5, step, j, name)
                u = Directions("gaussian").draw(key, values.shape)
                delta = (sigma * u + uniform(key._replace(purpose="rounding"), values.shape)).floor().double()
                outside = ((values + delta).abs() > most) | ((values - delta).abs() > most)
                dropped += int((outside & (delta != 0)).sum())
                found[name] = delta.masked_fill(outside, 0.0)
            changes.append(found)
            for sign in (1, -1):
                for name, layer in ours.items():
                    layer.write_integers((q[name] + sign * found[name]).to(torch.int8))
                losses.append(float(toys.loss_function(reference)(toys.batch(seed=step)).detach().double().mean()))
        values = torch.tensor(losses, dtype=torch.float64)
        scores = (values - values.mean()) / values.std(unbiased=False)
        coefficients = (scores[0::2] - scores[1::2]) / 2
        optimizer.step(toys.loss_function(net), toys.batch(seed=step))
        assert torch.allclose(optimizer.last_report.coefficients.double(), coefficients, atol=1e-3)
        for name in q:
            exact = optimizer.last_report.coefficients.double()
            x = gamma * e[name] - lr / k * sum(float(c) * found[name] for c, found in zip(exact, changes, strict=True)) / sigma
            rounded = x.round()
            rounded = rounded.masked_fill((q[name] + rounded).abs() > most, 0.0)
            q[name], e[name] = q[name] + rounded, (x - rounded).clamp(-1.5, 1.5)
            coordinate = next(c for c in optimizer.forward.coordinates if c.name == name)
            assert torch.equal(layers(net)[name].integers().double(), q[name])
            assert torch.allclose(coordinate.residual.double(), e[name], atol=1e-3)
            e[name] = coordinate.residual.double()
    assert dropped and any(
        bool((layer.integers() != start.integers()).any())
        for layer, start in zip(layers(net).values(), layers(model(bits)).values(), strict=True)
    )


@pytest.mark.parametrize(("bits", "lr"), [(8, 3.0), (4, 0.3)])
def test_a_quantized_model_learns_by_whole_numbers(bits, lr):
    net = model(bits)
    start = copy.deepcopy(net)
    losses = run(net, ZerothOrder(net, methods.qes(**FAST), lr=lr), 0, 40)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    trained, before = net.state_dict(), start.state_dict()
    assert {name.rpartition(".")[2] for name, tensor in trained.items() if not torch.equal(tensor, before[name])} == {"codes"}


def test_without_state_the_residual_is_that_of_the_last_steps():
    """Of h = 2 steps before, by a loop over them at the present integers; it is near the stored one as long as few integers change."""
    net, k, lr, gamma = model(4), 4, 0.02, 0.9
    optimizer = ZerothOrder(net, methods.qes(**FAST, window=2, decay=gamma), lr=lr)
    past = []
    for step in range(5):
        before = {c.name: c.layer.integers().clone() for c in optimizer.forward.coordinates}
        moves = {
            c.name: [[c.changes(optimizer.directions, Key(0, s, j, c.name)).double() / c.sigma for j in range(k)] for s in range(step + 1)]
            for c in optimizer.forward.coordinates
        }
        optimizer.step(toys.loss_function(net), toys.batch(seed=step))
        past.append(optimizer.last_report.coefficients.double())
        for c in optimizer.forward.coordinates:
            q, shape = before[c.name].double(), before[c.name].shape
            e = uniform(Key(0, 0, 0, c.name, "residual"), shape).double() - 0.5 if step == 0 else torch.zeros(shape, dtype=torch.float64)
            for s in range(max(0, step - 2), step + 1):
                x = gamma * e - lr / k * sum(float(a) * z for a, z in zip(past[s], moves[c.name][s], strict=True))
                whole = x.round()
                whole = whole.masked_fill((q + whole).abs() > 7, 0.0)
                e = (x - whole).clamp(-1.5, 1.5)
            assert torch.equal(c.layer.integers().double(), q + whole)
            assert not c.kept()
    assert optimizer.method.state_bytes([(32, 32)]) == 0 and optimizer.method.scalars == 3 * k


@pytest.mark.parametrize(("bits", "dtype", "window"), [(8, torch.float32, 0), (4, torch.bfloat16, 0), (8, torch.float32, 2)])
def test_runs_resume_and_replay_bit_for_bit(bits, dtype, window, tmp_path):
    def start(**arguments) -> tuple[nn.Module, ZerothOrder]:
        net = model(bits, dtype)
        return net, ZerothOrder(net, methods.qes(**FAST, window=window), lr=0.5, seed=3, **arguments)

    state = torch.get_rng_state()
    net, optimizer = start(journal=tmp_path / "j")
    losses = run(net, optimizer, 0, 4)
    optimizer.step(lambda batch: toys.loss_function(net)(batch) * math.nan, toys.batch())
    halted = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    losses = run(net, optimizer, 5, 10)
    assert torch.equal(state, torch.get_rng_state())
    rebuilt = model(bits, dtype)
    again = replay(rebuilt, tmp_path / "j")
    resumed, second = start()
    resumed.load_state_dict(halted[0])
    second.load_state_dict(halted[1])
    assert run(resumed, second, 5, 10) == losses
    assert equal(net, rebuilt) and equal(net, resumed)
    for other in (again, second):
        assert [t.state() for t in other.run.transforms] == [t.state() for t in optimizer.run.transforms]
        if window:
            continue
        assert all(
            torch.equal(a.residual, b.residual) for a, b in zip(optimizer.forward.coordinates, other.forward.coordinates, strict=True)
        )


def test_evaluations_write_nothing_and_state_is_as_declared():
    net = model()
    method = methods.qes(**FAST)
    optimizer = ZerothOrder(net, method, lr=0.5)
    before, seen = copy.deepcopy(net), []

    def watching(batch):
        seen.append(equal(net, before))
        return toys.loss_function(net)(batch)

    optimizer.step(watching, toys.batch())
    assert len(seen) == method.forwards_per_step and all(seen) and not equal(net, before)
    assert all(isinstance(c, CodeCoordinate) for c in optimizer.forward.coordinates)
    kept = sum(t.numel() * t.element_size() for c in optimizer.forward.coordinates for t in c.kept())
    assert kept == method.state_bytes([(32, 32), (4, 32)]) == 2 * 36 * 32
    assert all(parameter.grad is None for parameter in net.parameters())
    assert optimizer.drift() is None  # there is nothing to compare the integers with
    with pytest.raises(RuntimeError, match="a fault"):
        optimizer.step(lambda batch: (_ for _ in ()).throw(RuntimeError("a fault")), toys.batch())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ZerothOrder(toys.classifier(), "qes"), r"qes trains the integers of quantized .*: quantize it \(--quantize int8"),
        (lambda: ZerothOrder(model(), "qes", weight_decay=0.1), "so they cannot decay: set weight_decay and anchor_decay to 0"),
        (lambda: ZerothOrder(offloaded(), "qes"), "cannot be offloaded: leave offloading out"),
        (lambda: methods.qes(eps="auto"), "eps must be a positive number, in units of the quantized weights' integers"),
        (lambda: methods.qes(window=-1), "window must be a whole number of at least 0"),
        (lambda: methods.qes(decay=1.5), r"decay must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
