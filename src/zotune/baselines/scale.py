"""SCALE's update rule (2506.16659)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zotune.methods.rules.base import BaseRule


def column_normalized(gradient: Tensor, dim: int = 1) -> Tensor:
    """g / rms(g) over ``dim`` of a matrix (all but the first dimension of a larger tensor): every column has a root mean square of 1."""
    if gradient.dim() > 2:
        return column_normalized(gradient.flatten(1)).view_as(gradient)
    return gradient / gradient.square().mean(dim=dim, keepdim=True).sqrt().clamp_min(1e-8)


class SCALE(BaseRule):
    """Column-normalized SGD, momentum in the last layer, Adam for vectors.

    Args:
        params: groups.
        lr: learning rate.
        momentum: of the last layer.
        betas, eps: Adam's, for vectors.
        last: ids of the last layer's parameters.
        tables: ids of embeddings, whose columns are the features.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        last: frozenset[int],
        tables: frozenset[int],
    ) -> None:
        super().__init__(params, lr, weight_decay=0.0)
        self.momentum, self.betas, self.eps, self.ends, self.tables = momentum, betas, eps, last, tables

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(self._direction(p, grad, state), alpha=group["lr"])

    def _direction(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if p.dim() < 2:
            if not state:
                state.update(count=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["count"] += 1
            first, second = (1 - beta ** state["count"] for beta in self.betas)
            mean = state["exp_avg"].lerp_(gradient, 1 - self.betas[0])
            square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - self.betas[1])
            return (mean / first) / ((square / second).sqrt() + self.eps)
        if id(p) in self.ends:
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            gradient = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return column_normalized(gradient, 0 if id(p) in self.tables else 1)
