"""Momentum and Adam from the coefficient history: moments computed from the last h steps' coefficients, with no tensor between steps.

A step's estimate ĝ_j is a pure function of its key and its K coefficients, so moments over h steps need h·K scalars; an update draws the
directions of h steps instead of one (MeZO, 2305.17333, appendix B.2; AdaMeZO, 2605.00650). The update is that of the plain rule started
afresh h steps ago.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.methods.coefficients import CoefficientTransform, State
from zotune.rng.directions import Directions, Key
from zotune.subspaces.coordinate import Coordinate


class PastStep(NamedTuple):
    """A step that updated something: its number, and its coefficients as they were applied."""

    step: int
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class CoefficientHistory(CoefficientTransform):
    """An update rule on the last ``length`` steps, h."""

    length: int = 10
    replaces_rule = True

    @abstractmethod
    def update(self, coordinate: Coordinate, value: Tensor, past: Sequence[PastStep], lr: float, directions: Directions, seed: int) -> None:
        """Change ``value`` (θ of a coordinate) in place; ``past`` ends with the step itself."""

    def scalars(self, directions: int) -> int:
        return self.length * directions


@dataclass(frozen=True)
class HistoryMomentum(CoefficientHistory):
    """θ ← θ − η Σ_j β^(t−j) ĝ_j over the last h steps j.

    Raises:
        ValueError: a value is out of range.
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        _check(self.length, self.beta)

    @tagged("update")
    def update(self, coordinate: Coordinate, value: Tensor, past: Sequence[PastStep], lr: float, directions: Directions, seed: int) -> None:
        terms: list[tuple[Key, float]] = []
        for age, step in enumerate(reversed(past)):
            terms += terms_of(coordinate, step, seed, self.beta**age)
        value.add_(directions.combine(terms, coordinate.shape, coordinate.device).to(value.dtype), alpha=-lr)

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        return (1 - self.beta) / (1 - self.beta**self.length)  # one over the sum of the history's weights


@dataclass(frozen=True)
class HistoryAdam(CoefficientHistory):
    """θ ← θ − η m̂ / (√v̂ + ζ), m and v over the last h steps, bias-corrected for a start at 0 h steps ago.

    Without the correction it is AdaMeZO's θ ← θ − η m / √(v + ζ).

    Args:
        betas: (β₁, β₂).
        zeta: ζ.
        corrected: whether the moments are bias-corrected.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.7, 0.9)
    zeta: float = 1e-8
    corrected: bool = True

    def __post_init__(self) -> None:
        _check(self.length, *self.betas)

    @tagged("update")
    def update(self, coordinate: Coordinate, value: Tensor, past: Sequence[PastStep], lr: float, directions: Directions, seed: int) -> None:
        first, second = self.betas
        mean = torch.zeros(coordinate.shape, device=coordinate.device)
        square = torch.zeros_like(mean)
        for step in past:
            estimate = directions.combine(terms_of(coordinate, step, seed, 1.0), coordinate.shape, coordinate.device)
            mean.lerp_(estimate, 1 - first)
            square.mul_(second).addcmul_(estimate, estimate, value=1 - second)
        if self.corrected:
            mean.div_(1 - first ** len(past))
            root = square.div_(1 - second ** len(past)).sqrt_().add_(self.zeta)
        else:
            root = square.add_(self.zeta).sqrt_()
        value.add_(mean.div_(root).to(value.dtype), alpha=-lr)

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        sums = [1.0 if self.corrected else 1 - beta**self.length for beta in self.betas]  # of the weights of m and v
        return (moment / directions * sums[1]) ** 0.5 / sums[0]  # the step is η · sums[0] / √sums[1] whatever the size of ĝ


def terms_of(coordinate: Coordinate, past: PastStep, seed: int, weight: float) -> list[tuple[Key, float]]:
    """The directions of a past step's estimate, for one coordinate, and their factors in ``weight`` times it."""
    share = weight / len(past.coefficients)
    return [(Key(seed, past.step, k, coordinate.name), share * c) for k, c in enumerate(past.coefficients) if c]


def _check(history: int, *betas: float) -> None:
    if not isinstance(history, int) or history < 1:
        raise ValueError(f"history must be a whole number of at least 1, not {history!r}.")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"a decay rate must lie in [0, 1), not {beta!r}.")
