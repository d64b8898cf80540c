"""Losses of generated texts: batched evaluation gives those of one point after the other, or is given up with a sentence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import toys
from zotune import ZerothOrder, methods

WAYS = [{"num_directions": 2}, {"directions_per": "example"}]


def written(model: nn.Module, rows: Tensor, count: int = 4) -> Tensor:
    """The likeliest tokens behind each row, (R, count)."""
    for _ in range(count):
        rows = torch.cat([rows, model(rows)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return rows[:, -count:]


def reward(tokens: Tensor) -> Tensor:
    return -(tokens * torch.tensor([1.0, 0.7, 0.4, 0.2])).sum(dim=1)


def step(loss_fn, way: dict, eps: float) -> tuple[ZerothOrder, Tensor, list[str]]:
    """One step of a toy asked to be batched; its coefficients, and those of one point after the other."""
    found, model = [], toys.classifier()
    for forward_batching in ("sequential", "batched"):
        optimizer = ZerothOrder(model, methods.lozo(eps=eps, **way), lr=0.0, forward_batching=forward_batching)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(lambda rows: loss_fn(model, rows), toys.batch(8)[0])
        found.append(optimizer.last_report.coefficients)
        optimizer.remove_hooks()
    torch.testing.assert_close(found[1], found[0])
    return optimizer, found[0], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("way", WAYS)
def test_texts_generated_together_are_batched(way: dict) -> None:
    optimizer, coefficients, messages = step(lambda model, rows: reward(written(model, rows)), way, eps=0.3)
    assert optimizer.evaluator.batched and coefficients.any() and not messages


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_texts_generated_one_by_one_are_not_batched(eps: float, way: dict) -> None:
    """A single row would be evaluated at the first point for all; at a small ε no loss shows it."""

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        return torch.cat([reward(written(model, row[None])[:1]) for row in rows])

    optimizer, coefficients, messages = step(losses, way, eps)
    assert optimizer.evaluator.batched is False
    assert coefficients.any() == (eps == 0.3)
    assert any("calls the model with 1 of" in message for message in messages)


def test_losses_without_an_effect_are_compared_farther_away() -> None:
    """Padding behind texts up to the longest of a forward: the same at θ ± ε, another one at points that are farther away."""

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        lengths = written(model, rows).sum(dim=1)
        return lengths / lengths.max()

    optimizer, coefficients, messages = step(losses, {"num_directions": 2}, eps=1e-3)
    assert optimizer.evaluator.batched is False and not coefficients.any()
    assert any("depends on the rows beside it" in message for message in messages)
