"""The sign of every element of the estimate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zotune.methods.rules.base import BaseRule


class Sign(BaseRule):
    """θ ← θ − η sign(ĝ), element by element (ZO-signSGD, 2402.11592).

    Args:
        params: as for any torch optimizer.
        lr: η, by which every element changes.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.add_(grad.sign(), alpha=-group["lr"])
