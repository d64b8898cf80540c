"""Transforms of a step's coefficients between the estimator and the update rule, as a method states them.

:class:`CoefficientTransform` is what all of them state: evaluations of the batch, scalars of state, and the factor of the learning rate.
:mod:`zotune.optim.step_transforms` applies them.

- **Fitness**: coefficients from the *ranking* of the evaluated points instead of their losses (evolution strategies). It needs the losses,
so
  it comes before the journal, which holds the result.
- **Shaping**: coefficients rescaled by coefficients alone, those of the step (:class:`ByDeviation`) or all so far
  (:class:`ByRootMeanSquare`). It comes after the journal; replaying rebuilds its state.

None of them reads a parameter: plain SGD on transformed coefficients is still one pass over the weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged

#: Scalars of a shaping's state, by name.
State = dict[str, float]


class CoefficientTransform:
    """What a method does to coefficients; by default nothing.

    Attributes:
        normalizes: whether coefficients have a mean square of about 1 afterwards.
        replaces_rule: whether it is the update rule too.
    """

    normalizes = False
    replaces_rule = False

    def extra_forwards(self, step: int, points: int) -> int:
        """Evaluations of the batch beside those of the estimator's ``points``."""
        return 0

    def scalars(self, directions: int) -> int:
        """Scalars of state between steps, for K directions."""
        return 0

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        """Factor of plain SGD's η, for steps of K directions whose squared coefficients have the mean ``moment``.

        Raises:
            ValueError: it is not known.
        """
        return 1.0


@dataclass(frozen=True)
class ConservativeStep(CoefficientTransform):
    """c, 0 or −c, whichever of θ − ηcZ, θ and θ + ηcZ has the lowest loss (ZO-SGD-Cons, 2402.11592)."""

    def extra_forwards(self, step: int, points: int) -> int:
        return 3


class Shaping(CoefficientTransform):
    """c ↦ c′, the coefficients of the update."""

    normalizes = True

    @abstractmethod
    def shape(self, coefficients: Sequence[float], skipped: Sequence[bool], eps: float, state: State) -> list[float]:
        """c′ of a step; 0 where skipped. ``state`` (empty before the first step) is changed in place."""

    def sized(self, elements: int) -> Shaping:
        """The same for a model of which ``elements`` weights are trained."""
        return self


@dataclass(frozen=True)
class BySign(Shaping):
    """c′ = sign(c)."""

    @tagged("update")
    def shape(self, coefficients: Sequence[float], skipped: Sequence[bool], eps: float, state: State) -> list[float]:
        return [math.copysign(1.0, c) if c else 0.0 for c in coefficients]

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        # For a normal c: E[sign(c) Z] = √(2/π) ∇ / √M, and E[sign(c)²] = 1 in place of M.
        return math.sqrt(2 / math.pi * moment)


@dataclass(frozen=True)
class ByDeviation(Shaping):
    """c′ = c / σ, σ = ε · std(c): with forward differences the standard deviation of the K losses (FZOO, 2506.09034).

    c′ = 0 where σ is 0, or fewer than two directions are left.
    """

    @tagged("update")
    def shape(self, coefficients: Sequence[float], skipped: Sequence[bool], eps: float, state: State) -> list[float]:
        kept = [c for c, bad in zip(coefficients, skipped, strict=True) if not bad]
        if len(kept) < 2:
            return [0.0] * len(coefficients)
        mean = math.fsum(kept) / len(kept)
        sigma = eps * math.sqrt(math.fsum((c - mean) ** 2 for c in kept) / (len(kept) - 1))
        return [c / sigma if sigma > 0 else 0.0 for c in coefficients]

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        return eps * math.sqrt(moment)


@dataclass(frozen=True)
class ByRootMeanSquare(Shaping):
    """c′ = c / (√v̂ + ζ), v an average of squared coefficients: Adam's second moment as one scalar (MEAZO, 2605.03869).

    v ← β v + (1 − β) Σ c_k² / K²,   v̂ = v / (1 − βᵗ)

    Σ c_k² / K² is the mean, for K directions, of the paper's squared mean of the c_k; it cannot vanish.
    """

    beta: float = 0.999
    zeta: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), not {self.beta!r}.")

    def scalars(self, directions: int) -> int:
        return 2

    @tagged("update")
    def shape(self, coefficients: Sequence[float], skipped: Sequence[bool], eps: float, state: State) -> list[float]:
        kept = [c for c, bad in zip(coefficients, skipped, strict=True) if not bad]
        square = math.fsum(c * c for c in kept) / len(kept) ** 2
        state["v"] = self.beta * state.get("v", 0.0) + (1 - self.beta) * square
        state["t"] = state.get("t", 0) + 1
        root = math.sqrt(self._average(state)) + self.zeta
        return [c / root for c in coefficients]

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        # Where coefficients grow, as an adapter's do while it leaves 0, a long average is behind them, and steps are longer by that.
        now = moment / directions
        return math.sqrt(min(now, self._average(state)) if state else now)

    def _average(self, state: State) -> float:
        return state["v"] / (1 - self.beta ** state["t"])


@dataclass(frozen=True)
class Fitness(CoefficientTransform):
    """The fitness of the 2K points of a step, in place of the loss.

    Attributes:
        of: fitness (2K,) of the losses (2K, N) of N examples, float64; the lower the losses, the lower.
        slope: size of a coefficient, about.
    """

    of: Callable[[Tensor], Tensor]
    slope: float
    normalizes = True

    @tagged("update")
    def coefficients(self, plus: Tensor, minus: Tensor) -> Tensor:
        """c_k = (s(L(θ + εZ_k)) − s(L(θ − εZ_k))) / 2, so that (1/K) Σ c_k Z_k = (1/2K) Σ over the points of s · their direction.

        Args:
            plus, minus: losses at θ ± εZ_k, (K, N); directions with a non-finite one get 0 and do not count.
        """
        kept = (plus.double() + minus.double()).sum(dim=1).isfinite()
        out = torch.zeros(len(plus), dtype=torch.float64)
        if bool(kept.any()):
            fitness = self.of(torch.cat([plus[kept], minus[kept]]).double())
            high, low = fitness.chunk(2)
            out[kept] = (high - low) / 2
        return out.float()

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        """√M over the root mean square of the step's coefficients: :data:`SQUARE` of the state, where it has been recorded."""
        square = state.get(SQUARE, 0.0)
        return math.sqrt(moment) / (math.sqrt(square) if square > 0 else self.slope)


#: The entry of a state that holds the mean square of the coefficients that a :class:`Fitness` makes.
SQUARE = "fitness"


def _z_scores(losses: Tensor) -> Tensor:
    """Each column's (L − mean) / standard deviation; 0 where all are equal."""
    centered = losses - losses.mean(dim=0)
    deviation = centered.square().mean(dim=0).sqrt()
    equal = (losses == losses[0]).all(dim=0)
    return centered / deviation.masked_fill(equal, math.inf)


def _population_z_scores(losses: Tensor) -> Tensor:
    return _z_scores(losses.mean(dim=1, keepdim=True))[:, 0]


def _prompt_z_scores(losses: Tensor) -> Tensor:
    """The mean over examples of the z-score within an example's group of points (GRPO's advantage, 2402.03300)."""
    return _z_scores(losses).mean(dim=1)


def _centered_ranks(losses: Tensor) -> Tensor:
    """Ranks of the mean losses, spread evenly over [−½, ½]; equal losses share their mean rank."""
    losses = losses.mean(dim=1)
    _, place, count = losses.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    rank = (last - (count.double() + 1) / 2)[place]  # from 0
    return rank / (len(losses) - 1) - 0.5


#: By name; None: the loss itself.
FITNESS: dict[str, Fitness | None] = {
    "loss": None,
    "raw": None,
    "z-score": Fitness(_population_z_scores, 1.0),
    "ranks": Fitness(_centered_ranks, math.sqrt(1 / 12)),
    "prompt-z-score": Fitness(_prompt_z_scores, 1.0),
}
