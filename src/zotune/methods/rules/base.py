"""Base of the built-in rules: one equation per parameter, after decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class BaseRule(torch.optim.Optimizer):
    """A rule that is one equation: subclasses write :meth:`update`.

    Args:
        params: as for any torch optimizer.
        lr: η.
        weight_decay: λ of θ ← (1 − η λ) θ, before the update (as AdamW).
        options: further entries of every parameter group.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change ``p`` in place by one step along the estimate ``grad``."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.update(p, self.decayed(p, p.grad, group) if group["weight_decay"] else p.grad, self.state[p], group)
        return loss

    def decayed(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Weight decay before the update, of ``p`` itself; the estimate that the update then takes."""
        p.mul_(1 - group["lr"] * group["weight_decay"])
        return grad


def fraction(name: str, value: float) -> float:
    """``value``, checked to be the decay rate of an average.

    Raises:
        ValueError: it does not lie in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), not {value}.")
    return value
