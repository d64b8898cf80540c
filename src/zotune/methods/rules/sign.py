"""The sign of every number of the estimate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zotune.methods.rules.base import OwnRule


class Sign(OwnRule):
    """θ ← θ − η sign(ĝ), number by number (ZO-signSGD, 2402.11592).

    Args:
        params: as in any torch optimizer.
        lr: η, by which every number moves.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.add_(grad.sign(), alpha=-group["lr"])
