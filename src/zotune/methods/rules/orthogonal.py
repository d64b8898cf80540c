"""The orthogonal factor of a matrix, by matrix products alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zotune.methods.rules.base import BaseRule

#: Coefficients of Muon's quintic: five rounds map singular values in (0, 1] to about 0.7 to 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrix: Tensor, rounds: int = 5) -> Tensor:
    """A matrix of the same singular vectors whose singular values are all about 1 (Newton–Schulz, as in Muon, 2502.16982).

    X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, from X = M / ‖M‖_F; a matrix of zeros is unchanged.

    Args:
        matrix: M, (m, n), float32; or a stack of them, (E, m, n).
        rounds: number of iterations.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() if x.dim() == 2 else x.flatten(1).norm(dim=1).view(-1, 1, 1)).clamp_min(1e-30)
    for _ in range(rounds):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Orthogonal(BaseRule):
    """θ ← θ − η NewtonSchulz(ĝ); a vector is a matrix of one row, whose orthogonal factor is ĝ / ‖ĝ‖ (ZO-Muon, 2602.17155).

    Args:
        params: as for any torch optimizer.
        lr: η, the size of every singular value of an update.
    """

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        matrix = grad.dim() in (2, 3) and min(grad.shape[-2:]) > 1
        p.add_(orthogonalized(grad) if matrix else grad / grad.norm().clamp_min(1e-30), alpha=-group["lr"])
