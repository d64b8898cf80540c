"""The orthogonal factor of a matrix: of all of it by matrix products alone, or of its leading part by power iteration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zotune.methods.rules.base import BaseRule, fraction

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
        p.add_(orthogonalized(grad) if _is_matrix(grad) else grad / grad.norm().clamp_min(1e-30), alpha=-group["lr"])


def _is_matrix(grad: Tensor) -> bool:
    """Whether it is a matrix or a stack of them, of more than one row and column."""
    return grad.dim() in (2, 3) and min(grad.shape[-2:]) > 1


class PartialOrthogonal(BaseRule):
    """θ ← θ − η V Uᵀ, of the leading part of M = an average of ĝ, by one step of power iteration (ZO-MOPI, 2605.09034).

    M ← β M + (1 − β) ĝ,   V ← Q of the QR decomposition of M (Mᵀ V),   U = Mᵀ V with columns of length 1

    M begins with the first ĝ, V with the first columns of M: in a random subspace of uniform distribution those are random vectors. For a
    matrix that is wider than high M stands for its transpose. A vector is updated as by :class:`Orthogonal`, along M / ‖M‖.

    Args:
        params: as for any torch optimizer.
        lr: η.
        share: columns of V, as a share of the shorter side of the matrix.
        beta: β.
    """

    def __init__(self, params: Any, lr: float = 1e-2, share: float = 0.5, beta: float = 0.0, weight_decay: float = 0.0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], not {share}.")
        super().__init__(params, lr, weight_decay, share=share, beta=fraction("beta", beta))

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        moment = grad
        if group["beta"]:
            moment = state["exp_avg"].lerp_(grad, 1 - group["beta"]) if "exp_avg" in state else grad.clone()
            state["exp_avg"] = moment
        if not _is_matrix(moment):
            p.add_(moment / moment.norm().clamp_min(1e-30), alpha=-group["lr"])
            return
        wide = moment.shape[-2] < moment.shape[-1]
        m = moment.mT if wide else moment
        v = state["right"] if "right" in state else m[..., : math.ceil(group["share"] * m.shape[-1] - 1e-9)]
        v = torch.linalg.qr(m @ (m.mT @ v)).Q.contiguous()  # as a file gives it back
        u = torch.nn.functional.normalize(m.mT @ v, dim=-2, eps=1e-30)
        state["right"] = v
        step = v @ u.mT
        p.add_(step.mT if wide else step, alpha=-group["lr"])
