"""MeZO-SVRG: periods, the equation of a step, and what it is for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods
from zotune.methods.svrg import SVRGSchedule
from zotune.rng.directions import Directions, Key


def test_periods():
    schedule = SVRGSchedule(batches=2, interval=3, ratio=1.0)
    assert [schedule.at_snapshot(step) for step in range(7)] == [True, True, False, False, False, True, True]
    assert [schedule.key_step(step) for step in range(7)] == [0, 0, 2, 3, 4, 5, 5]


def along(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    return {n: Directions("gaussian").draw(Key(0, step, 0, n), p.shape) for n, p in model.named_parameters()}


def moved(model: nn.Module, z: dict[str, torch.Tensor], scale: float) -> nn.Module:
    out = copy.deepcopy(model).requires_grad_(False)
    for n, p in out.named_parameters():
        p += scale * z[n]
    return out


def slope(model: nn.Module, z: dict[str, torch.Tensor], x, eps: float) -> float:
    plus, minus = (toys.loss_function(moved(model, z, sign * eps))(x).double().mean() for sign in (1, -1))
    return float(plus - minus) / (2 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_of_a_period_is_its_equation(dtype):
    eps, lr, ratio = 5e-2, 1e-3, 20.0
    model = toys.classifier(dtype)
    optimizer = ZerothOrder(model, methods.mezo_svrg(eps=eps, anchor_batches=2, interval=3, anchor_ratio=ratio), lr=lr)
    exact = {c.name: c for c in optimizer.forward.coordinates}
    anchor, g = None, 0.0

    def now() -> nn.Module:
        out = toys.classifier().requires_grad_(False)
        for n, p in out.named_parameters():
            p.copy_(exact[n].value())
        return out

    for step in range(10):
        x, before = toys.batch(seed=step), now()
        first, place = step - step % 5, step % 5
        optimizer.step(toys.loss_function(model), x)
        z, z_anchor = along(before, step), along(before, first)
        if place < 2:
            g = slope(before, z_anchor, x, eps) / 2 + (g if place else 0.0)
            anchor = before
            expected = moved(before, z_anchor, -lr * ratio * g) if place else before
        else:
            difference = slope(before, z, x, eps) - slope(anchor, z, x, eps)
            expected = moved(moved(before, z, -lr * difference), z_anchor, -lr * g)
        tolerance = 2e-5 if dtype == torch.float32 else 5e-3  # losses of bfloat16 weights are rounded
        for ours, theirs in zip(now().parameters(), expected.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=tolerance), step


def test_what_is_peculiar_to_a_batch_cancels():
    """Examples whose gradients differ by constants: at the anchor's step all of their noise is in c, and later none is."""
    model = nn.Linear(3, 1, bias=False)
    optimizer = ZerothOrder(model, methods.mezo_svrg(eps=1e-2, anchor_batches=1, interval=4, anchor_ratio=1.0), lr=1e-4)

    def loss(noise):
        return model(torch.eye(3)).square().sum() + (model(noise) * 100).sum()

    sizes = []
    for step in range(10):
        optimizer.step(loss, torch.randn(1, 3, generator=torch.Generator().manual_seed(step)))
        sizes.append(abs(float(optimizer.last_report.coefficients)))
    assert max(sizes[1:5] + sizes[6:10]) < 1 < 10 < min(sizes[0], sizes[5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_batches": 0}, "anchor_batches must be a whole number of at least 1"),
        ({"interval": 0}, "interval must be a whole number of at least 1"),
        ({"anchor_ratio": 0.0}, "anchor_ratio must be above 0"),
        ({"directions_per": "example"}, "method 'mezo-svrg' has no option 'directions_per'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        methods.mezo_svrg(**options)


def test_its_two_rates_cannot_be_measured():
    with pytest.raises(ValueError, match="'auto' is not known for SVRG, which has two"):
        ZerothOrder(toys.classifier(), "mezo-svrg", lr="auto")
