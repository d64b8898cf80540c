"""The JAGUAR rules: a step estimates a few coordinates, and the last estimates of the others are stored.

The estimate is 0 on every coordinate that was not perturbed (see ``rng.sparse_directions``), so the chosen coordinates are those where it
is not 0. A loss difference of exactly 0 chooses none and leaves the memory unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zotune.methods.rules.base import BaseRule, fraction
from zotune.methods.rules.orthogonal import orthogonalized


class JaguarSign(BaseRule):
    """m ← β m + (1 − β) ĝ on the chosen coordinates, others kept; θ ← θ − η sign(m) everywhere (JAGUAR SignSGD, 2506.04430).

    Args:
        params: as for any torch optimizer.
        lr: η, by which every coordinate changes that was ever chosen.
        beta: β.
    """

    def __init__(self, params: Any, lr: float = 1e-4, beta: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay, beta=fraction("beta", beta))

    def remember(self, p: Tensor, grad: Tensor, state: dict[str, Any], beta: float) -> Tensor:
        """m, renewed on the chosen coordinates."""
        memory = state.setdefault("exp_avg", torch.zeros_like(p))
        renewed = memory.lerp(grad, 1 - beta)
        return torch.where(grad != 0, renewed, memory, out=memory)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.add_(self.remember(p, grad, state, group["beta"]).sign(), alpha=-group["lr"])


class JaguarMuon(JaguarSign):
    """m as in :class:`JaguarSign`; W ← W − η NewtonSchulz(m) for matrices, the sign elsewhere (JAGUAR Muon, 2506.04430)."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        memory = self.remember(p, grad, state, group["beta"])
        matrix = memory.dim() == 2 and min(memory.shape) > 1
        p.add_(orthogonalized(memory) if matrix else memory.sign(), alpha=-group["lr"])


class PersistentSign(BaseRule):
    """s ← sign(ĝ) on the chosen coordinates, others kept; θ ← θ − η s everywhere (ZO-Jaguar).

    s is stored as one signed byte per coordinate.

    Args:
        params: as for any torch optimizer.
        lr: η, by which every coordinate changes that was ever chosen.
    """

    def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        signs = state.setdefault("signs", torch.zeros_like(p, dtype=torch.int8))
        torch.where(grad != 0, grad.sign().to(torch.int8), signs, out=signs)
        p.add_(signs.to(p.dtype), alpha=-group["lr"])
