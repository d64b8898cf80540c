"""What loss functions return, as one tensor of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged

LossFunction = Callable[..., Any]


def evaluation(loss_fn: LossFunction, parts: Sequence[Any] | None) -> Callable[[], Tensor]:
    """A function without arguments that gives the losses of all micro-batches, float32, shape (n,)."""
    if parts is None:
        return lambda: as_losses([loss_fn()])
    return lambda: as_losses([loss_fn(part) for part in parts])


def losses_of(loss_fn: LossFunction, rows: Any) -> Tensor:
    return as_losses([loss_fn(rows)])


@tagged("activations")
def as_losses(parts: list[Any]) -> Tensor:
    """What a loss function returned for each micro-batch, as one float32 tensor of shape (n,).

    Raises:
        ValueError: one of them is neither a scalar nor one loss per example.
    """
    losses = []
    for part in parts:
        loss = part if isinstance(part, Tensor) else torch.as_tensor(part, dtype=torch.float32)
        if loss.dim() > 1:
            raise ValueError(f"the loss function returned shape {tuple(loss.shape)}; return one loss per example, shape (B,), or a scalar.")
        losses.append(loss.detach().float().reshape(-1))
    return torch.cat(losses)
