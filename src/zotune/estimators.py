"""Estimators: how losses at points θ + s ε Z_k become coefficients c_k, the gradient estimate being ĝ = (1/K) Σ_k c_k Z_k.

An estimator is two pure functions: the points it wants, and the coefficients it makes of the losses there. Nothing larger than the vector
of K coefficients leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Point(NamedTuple):
    """θ + sign · ε · Z_direction; sign 0 is θ itself."""

    sign: int
    direction: int


class Estimate(NamedTuple):
    """What a step's losses amount to.

    Attributes:
        loss: mean loss of the batch (float).
        coefficients: c_k, float32 on the CPU, shape (K,); 0 where skipped.
        skipped: per direction, whether a loss was not finite.
        gap: mean over k of the absolute loss difference that c_k is made of.
        gap_noise: its standard error over the examples of the batch; None if the loss is a scalar or the batch one example.
    """

    loss: float
    coefficients: Tensor
    skipped: tuple[bool, ...]
    gap: float
    gap_noise: float | None


class Estimator(Protocol):
    """Points to evaluate, and what the losses there amount to."""

    def points(self, num_directions: int) -> list[Point]: ...

    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate: ...


@dataclass(frozen=True)
class Central:
    """c_k = (L(θ + εZ_k) − L(θ − εZ_k)) / 2ε, n-SPSA; 2K evaluations, error O(ε²) (2305.17333)."""

    def points(self, num_directions: int) -> list[Point]:
        return [Point(sign, k) for k in range(num_directions) for sign in (+1, -1)]

    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate:
        pairs = [(losses[2 * k], losses[2 * k + 1]) for k in range(num_directions)]
        levels = [0.5 * (_mean(plus) + _mean(minus)) for plus, minus in pairs]
        return _estimate(pairs, levels, 2 * eps)


@dataclass(frozen=True)
class Forward:
    """c_k = (L(θ + εZ_k) − L(θ)) / ε; K + 1 evaluations, error O(ε) (FZOO's, 2506.09034)."""

    def points(self, num_directions: int) -> list[Point]:
        return [Point(0, 0)] + [Point(+1, k) for k in range(num_directions)]

    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate:
        here = losses[0]
        pairs = [(losses[1 + k], here) for k in range(num_directions)]
        return _estimate(pairs, [_mean(here)] * num_directions, eps)


ESTIMATORS: dict[str, Estimator] = {"central": Central(), "forward": Forward()}


def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())


def _estimate(pairs: Sequence[tuple[Tensor, Tensor]], levels: Sequence[float], width: float) -> Estimate:
    coefficients, skipped, gaps, noises = [], [], [], []
    for high, low in pairs:
        difference = high.double() - low.double()
        gap = float(difference.mean())
        bad = not math.isfinite(gap)
        skipped.append(bad)
        coefficients.append(0.0 if bad else gap / width)
        if not bad:
            gaps.append(abs(gap))
            if difference.numel() > 1:
                noises.append(float(difference.std()) / math.sqrt(difference.numel()))
    finite = [level for level in levels if math.isfinite(level)]
    return Estimate(
        loss=sum(finite) / len(finite) if finite else math.nan,
        coefficients=torch.tensor(coefficients, dtype=torch.float32),
        skipped=tuple(skipped),
        gap=sum(gaps) / len(gaps) if gaps else math.nan,
        gap_noise=sum(noises) / len(noises) if noises else None,
    )
