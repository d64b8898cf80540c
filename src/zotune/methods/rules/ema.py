"""Rules on moving averages of the estimate that torch lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zotune.methods.rules.base import BaseRule, fraction


class EMASGD(BaseRule):
    """SGD on an exponential moving average that starts at zero: N ← βN + (1 − β) ĝ, θ ← θ − η N (LOZO-M, 2410.07698).

    ``torch.optim.SGD(momentum=β, dampening=β)`` differs in its first step, which is not dampened.

    Args:
        params: as for any torch optimizer.
        lr: η.
        beta: β, in [0, 1).
    """

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay, beta=fraction("beta", beta))

    def decayed(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """As in SGD: a part of the estimate, ĝ + λ θ."""
        return grad.add(p, alpha=group["weight_decay"])

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        average = state.setdefault("exp_avg", torch.zeros_like(p))
        average.lerp_(grad, 1 - group["beta"])
        p.add_(average, alpha=-group["lr"])


class RAdaZO(BaseRule):
    """Adam whose second moment is that of the first: the average has less noise than the estimate (R-AdaZO, 2502.01014).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) m²,   θ ← θ − η m / √(v + ζ)

    As in the paper the moments are not bias-corrected.

    Args:
        params: as for any torch optimizer.
        lr: η.
        betas: (β₁, β₂).
        zeta: ζ.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), zeta: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        first, second = betas
        super().__init__(params, lr, weight_decay, betas=(fraction("beta1", first), fraction("beta2", second)), zeta=zeta)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean = state.setdefault("exp_avg", torch.zeros_like(p))
        square = state.setdefault("exp_avg_sq", torch.zeros_like(p))
        first, second = group["betas"]
        mean.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(mean, mean, value=1 - second)
        p.addcdiv_(mean, torch.add(square, group["zeta"]).sqrt_(), value=-group["lr"])
