"""Losses of float64 models keep their precision up to the coefficients, which journals hold in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from zotune import ZerothOrder, methods
from zotune.subspaces.coordinate import Offset


def quadratic() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(30, 40).double(), torch.randn(4, 30, dtype=torch.float64)


def derivatives(optimizer: ZerothOrder, model: nn.Module, x: Tensor, step: int) -> Tensor:
    """∇L · Z_k by backpropagation, of each direction of a step."""
    coordinates = list(optimizer.run.state.every_coordinate())
    here = {c.name: c.at(optimizer.directions, None).clone().requires_grad_() for c in coordinates}
    found = []
    for k in range(len(optimizer.last_report.coefficients)):
        losses = 1 + torch.func.functional_call(model, here, x).square().mean(dim=1)
        loss = losses[k // optimizer.method.num_directions] if optimizer.method.own else losses.mean()
        gradients = torch.autograd.grad(loss, list(here.values()))
        moves = [c.at(optimizer.directions, Offset(1.0, 0, step, k)) - here[c.name] for c in coordinates]
        found.append(sum((g * z).sum() for g, z in zip(gradients, moves, strict=True)))
    return torch.stack(found).detach()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("name", "error"), [("mezo", 1e-6), ("lozo", 1e-6), ("lozo-e", 1e-3), ("subzero", 1e-3)])
def test_float64_losses_keep_their_digits_at_a_small_eps(name, error, closure):
    """A float32 loss of about 2 has an error of 1e-7, a tenth of ε: forward differences would be off by 0.1."""
    model, x = quadratic()
    twin, method = copy.deepcopy(model), methods.get(name, eps=1e-6)
    optimizer = ZerothOrder(model, method, lr=0.0)

    def losses(rows: Tensor) -> Tensor:
        return 1 + model(rows).square().mean(dim=1)

    if closure and method.own:
        pytest.skip("a closure has one loss")
    if closure:
        optimizer.step(lambda: float(losses(x).mean()))
    else:
        optimizer.step(losses, x)
    expected = derivatives(optimizer, twin, x, 0)
    assert torch.allclose(optimizer.last_report.coefficients.double(), expected, rtol=error, atol=error * float(expected.abs().mean()))
