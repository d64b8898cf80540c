"""Estimators: how losses at points θ + s ε Z_k become coefficients c_k, the gradient estimate being ĝ = (1/K) Σ_k c_k Z_k.

An estimator is two pure functions: points to evaluate, and coefficients from the losses there: a vector of K, and nothing larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged


class Point(NamedTuple):
    """θ + sign · ε · Z_direction; sign 0 is θ itself, and between −1 and 1 it is a shorter way."""

    sign: float
    direction: int


class Estimate(NamedTuple):
    """A step's estimate.

    Attributes:
        loss: mean loss of the batch (float).
        coefficients: c_k, float32 on the CPU, shape (K,); 0 where skipped.
        skipped: per direction, whether a loss was not finite.
        loss_diff: mean over k of the absolute loss difference behind c_k.
        loss_diff_stderr: its standard error over the examples of the batch; None if the loss is a scalar or the batch one example.
        curvatures: q_k, float32 on the CPU, shape (K,), 0 where skipped; empty for estimators without curvature. Of a step with an output
            window what it needs of the step later (see ``optim.output_window``), of any length.
    """

    loss: float
    coefficients: Tensor
    skipped: tuple[bool, ...]
    loss_diff: float
    loss_diff_stderr: float | None
    curvatures: Tensor = torch.empty(0)


class Estimator(Protocol):
    """Points to evaluate, and the estimate from the losses there.

    Attributes:
        signs: the signs at which one direction alone is evaluated.
    """

    signs: ClassVar[tuple[int, ...]]

    def points(self, num_directions: int) -> list[Point]: ...

    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate: ...

    def estimate_own(self, losses: Tensor, owners: Tensor, eps: float, num_directions: int) -> Estimate: ...

    def singles(self, losses: Tensor, eps: float, num_directions: int) -> Tensor:
        """Coefficients of single examples, (K, N), of the losses (P, N) at the points."""
        ...


@dataclass(frozen=True)
class Central:
    """c_k = (L(θ + εZ_k) − L(θ − εZ_k)) / 2ε, n-SPSA; 2K evaluations, error O(ε²) (2305.17333)."""

    signs: ClassVar[tuple[int, ...]] = (+1, -1)

    def points(self, num_directions: int) -> list[Point]:
        return [Point(sign, k) for k in range(num_directions) for sign in (+1, -1)]

    @tagged("activations")
    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate:
        pairs = [(losses[2 * k], losses[2 * k + 1]) for k in range(num_directions)]
        levels = [0.5 * (_mean(plus) + _mean(minus)) for plus, minus in pairs]
        return _estimate(pairs, levels, 2 * eps)

    @tagged("activations")
    def estimate_own(self, losses: Tensor, owners: Tensor, eps: float, num_directions: int) -> Estimate:
        return _estimate_own(losses[0], losses[1], losses.double().mean(dim=0), owners, 2 * eps, num_directions)

    @tagged("activations")
    def singles(self, losses: Tensor, eps: float, num_directions: int) -> Tensor:
        return (losses[0 : 2 * num_directions : 2].double() - losses[1 : 2 * num_directions : 2].double()) / (2 * eps)


@dataclass(frozen=True)
class Forward:
    """c_k = (L(θ + εZ_k) − L(θ)) / ε; K + 1 evaluations, error O(ε) (FZOO's, 2506.09034)."""

    signs: ClassVar[tuple[int, ...]] = (0, +1)

    def points(self, num_directions: int) -> list[Point]:
        return [Point(0, 0)] + [Point(+1, k) for k in range(num_directions)]

    @tagged("activations")
    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate:
        here = losses[0]
        pairs = [(losses[1 + k], here) for k in range(num_directions)]
        return _estimate(pairs, [_mean(here)] * num_directions, eps)

    @tagged("activations")
    def estimate_own(self, losses: Tensor, owners: Tensor, eps: float, num_directions: int) -> Estimate:
        return _estimate_own(losses[1], losses[0], losses[0].double(), owners, eps, num_directions)

    @tagged("activations")
    def singles(self, losses: Tensor, eps: float, num_directions: int) -> Tensor:
        return (losses[1:].double() - losses[0].double()) / eps


@dataclass(frozen=True)
class Curvature(Central):
    """:class:`Central`, and q_k = |L(θ + εZ_k) + L(θ − εZ_k) − 2 L(θ)| / 2ε²; 2K + 1 evaluations (HiZOO, 2402.15173).

    A direction counts only if its three losses are finite.
    """

    signs: ClassVar[tuple[int, ...]] = (+1, -1)

    def points(self, num_directions: int) -> list[Point]:
        return [*super().points(num_directions), Point(0, 0)]

    @tagged("activations")
    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate:
        here = _mean(losses[-1])
        if not math.isfinite(here):
            losses = [torch.full_like(loss, math.nan) for loss in losses]
        estimate = super().estimate(losses[:-1], eps, num_directions)
        pairs = [(_mean(losses[2 * k]), _mean(losses[2 * k + 1])) for k in range(num_directions)]
        q = [0.0 if bad else abs(a + b - 2 * here) / (2 * eps**2) for (a, b), bad in zip(pairs, estimate.skipped, strict=True)]
        return estimate._replace(curvatures=torch.tensor(q, dtype=torch.float32))


@dataclass(frozen=True)
class Tangent(Central):
    """c_k = ∇L(θ) · Z_k by forward-mode differentiation: exact, one evaluation per direction, at the cost of about two forwards."""

    def points(self, num_directions: int) -> list[Point]:
        return [Point(0, k) for k in range(num_directions)]

    @tagged("activations")
    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate:
        """From losses and their derivatives, alternating, 2K tensors."""
        primals, tangents = losses[0::2], losses[1::2]
        levels = [_mean(primal) for primal in primals]
        kept = [t if math.isfinite(level) else torch.full_like(t, math.nan) for t, level in zip(tangents, levels, strict=True)]
        return _estimate([(t, torch.zeros_like(t)) for t in kept], levels, 1.0)

    @tagged("activations")
    def singles(self, losses: Tensor, eps: float, num_directions: int) -> Tensor:
        return losses[1::2].double()


@dataclass(frozen=True)
class LeaveOneOut(Forward):
    """c_k = K/(K − 1) · (L(θ + εZ_k) − L̄) / ε, L̄ the mean of the K losses; K evaluations, θ itself is none of them.

    The same as the difference to the mean of the others. Points that are not finite do not count; a direction alone gets 0.
    """

    def points(self, num_directions: int) -> list[Point]:
        return [Point(+1, k) for k in range(num_directions)]

    @tagged("activations")
    def estimate(self, losses: Sequence[Tensor], eps: float, num_directions: int) -> Estimate:
        levels = [_mean(loss) for loss in losses]
        finite = [loss for loss, level in zip(losses, levels, strict=True) if math.isfinite(level)]
        if len(finite) < 2:
            return _estimate([(loss, torch.full_like(loss, math.nan)) for loss in losses], levels, eps)
        mean = torch.stack([loss.double() for loss in finite]).mean(dim=0)
        return _estimate([(loss, mean) for loss in losses], levels, eps * (len(finite) - 1) / len(finite))

    @tagged("activations")
    def singles(self, losses: Tensor, eps: float, num_directions: int) -> Tensor:
        return (losses.double() - losses.double().mean(dim=0)) * (len(losses) / max(1, len(losses) - 1) / eps)


ESTIMATORS: dict[str, Estimator] = {
    "central": Central(),
    "forward": Forward(),
    "leave-one-out": LeaveOneOut(),
    "curvature": Curvature(),
    "tangent": Tangent(),
}


@tagged("activations")
def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())


@tagged("activations")
def _estimate(pairs: Sequence[tuple[Tensor, Tensor]], levels: Sequence[float], width: float) -> Estimate:
    coefficients, skipped, differences, errors = [], [], [], []
    for high, low in pairs:
        difference = high.double() - low.double()
        loss_diff = float(difference.mean())
        bad = not math.isfinite(loss_diff)
        skipped.append(bad)
        coefficients.append(0.0 if bad else loss_diff / width)
        if not bad:
            differences.append(abs(loss_diff))
            if difference.numel() > 1:
                errors.append(float(difference.std()) / math.sqrt(difference.numel()))
    finite = [level for level in levels if math.isfinite(level)]
    return Estimate(
        loss=sum(finite) / len(finite) if finite else math.nan,
        coefficients=torch.tensor(coefficients, dtype=torch.float32),
        skipped=tuple(skipped),
        loss_diff=sum(differences) / len(differences) if differences else math.nan,
        loss_diff_stderr=sum(errors) / len(errors) if errors else None,
    )


@tagged("activations")
def _estimate_own(high: Tensor, low: Tensor, levels: Tensor, owners: Tensor, width: float, num_directions: int) -> Estimate:
    """Every example under its own direction, or its group's: c_k = K/(N · width) Σ over the examples i of direction k of (high_i − low_i).

    With groups of one size that is the group's mean difference over ``width``; otherwise a group counts by its examples, so that the mean
    of c_k Z_k over k is the mean over examples. Only directions with a non-finite loss, or without an example, are skipped.

    Args:
        high, low, levels: losses of the difference, and those to report, (N,).
        owners: direction of each example, (N,), numbers below ``num_directions``.
    """
    k, n = num_directions, len(owners)
    difference = high.double() - low.double()
    counts = torch.bincount(owners, minlength=k)
    sums = difference.new_zeros(k).index_add_(0, owners, difference)
    skipped = ~sums.isfinite() | (counts == 0)
    sums = sums.masked_fill(skipped, 0.0)
    finite = levels[levels.isfinite()]
    kept = ~skipped
    means = sums / counts.clamp(min=1)
    differences = means.abs()[kept]
    error = None
    if bool(kept.any()) and int(counts[kept].min()) > 1:
        squares = difference.new_zeros(k).index_add_(0, owners, (difference - means[owners]).square())
        error = float((squares[kept] / (counts[kept] - 1) / counts[kept]).sqrt().mean())
    return Estimate(
        loss=float(finite.mean()) if len(finite) else math.nan,
        coefficients=(sums * (k / (n * width))).float(),
        skipped=tuple(skipped.tolist()),
        loss_diff=float(differences.mean()) if len(differences) else math.nan,
        loss_diff_stderr=error,
    )
