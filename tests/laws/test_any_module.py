"""Any module is trained: weights of experts, convolutions, recurrent layers and einsum, by the default method and its relatives."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import zotune
from any_modules import NAMES, batch_of, build, losses_of
from zotune.subspaces.coordinate import Offset

SEED, EPS = 3, 1e-3
METHODS = ["lozo-g", "lozo", "lozo-e", "mezo"]

every_module = pytest.mark.parametrize("name", NAMES)
every_method = pytest.mark.parametrize("method", METHODS)


def optimizer_of(model: nn.Module, method: str, lr: float | str, eps: float = EPS) -> zotune.ZerothOrder:
    return zotune.ZerothOrder(model, zotune.methods.get(method, eps=eps), lr=lr, seed=SEED)


def step(optimizer: zotune.ZerothOrder, model: nn.Module, batch: Any) -> Tensor:
    """A step whose warnings about a slower evaluation are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return optimizer.step(lambda rows: losses_of(model, rows), batch)


def expected_coefficients(optimizer: zotune.ZerothOrder, twin: nn.Module, batch: Any) -> Tensor:
    """Differences of the losses of a plain copy of the module with other weights, along the step's directions."""

    def at(scale: float, direction: int) -> Tensor:
        offset = Offset(scale, SEED, 0, direction) if scale else None
        weights = {c.name: c.at(optimizer.directions, offset) for c in optimizer.run.state.every_coordinate()}
        with torch.no_grad():
            return losses_of(lambda *args, **kwargs: functional_call(twin, weights, args, kwargs), batch)

    method = optimizer.method
    if not method.own:
        assert method.directions_of(0) == 1
        return ((at(EPS, 0) - at(-EPS, 0)) / (2 * EPS)).mean().unsqueeze(0)
    rows, each = len(at(0, 0)), method.num_directions
    return torch.stack([(at(EPS, k)[k // each] - at(0, 0)[k // each]) / EPS for k in range(rows * each)])


@every_module
@every_method
def test_coefficients_are_differences_along_directions(name, method):
    """And after a step at learning rate 0 all weights are as before, bit for bit."""
    model, batch = build(name), batch_of(name)
    twin, before = copy.deepcopy(model), {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = optimizer_of(model, method, 0.0)
    step(optimizer, model, batch)
    found, expected = optimizer.last_report.coefficients, expected_coefficients(optimizer, twin, batch)
    assert found.shape == expected.shape and expected.abs().min() > 0
    assert torch.allclose(found, expected, rtol=0.01, atol=0.01 * float(expected.square().mean().sqrt())), (found, expected)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@every_module
@pytest.mark.parametrize("method", ["lozo-g", "lozo", "mezo"])  # lozo-e has the steps of lozo-g for this loss
def test_every_module_learns(name, method):
    """At ε = 0.01 where experts are chosen: a choice that changes between two points is a jump, which a small ε enlarges."""
    model, batch = build(name), batch_of(name)
    with torch.no_grad():
        before = losses_of(model, batch).mean()
    optimizer = optimizer_of(model, method, "auto", eps=1e-2 if name in ("mixtral", "gpt-oss", "qwen2-moe", "deepseek-v3") else EPS)
    for _ in range(6):
        step(optimizer, model, batch)
    with torch.no_grad():
        assert losses_of(model, batch).mean() < before - 0.001


def test_forward_mode_names_the_option_for_experts():
    model, batch = build("mixtral"), batch_of("mixtral")
    optimizer = zotune.ZerothOrder(model, "forward-grad", lr=0.0)
    with pytest.raises(ValueError, match="load it with experts_implementation='eager'"):
        step(optimizer, model, batch)
    optimizer.remove_hooks()
    model.config._experts_implementation = "eager"
    step(zotune.ZerothOrder(model, "forward-grad", lr=0.0), model, batch)
