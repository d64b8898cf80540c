"""A step to the best of the sampled points (RandOpt)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zotune.io.memory_tags import tagged
from zotune.methods.coefficients import Shaping, State


@dataclass(frozen=True)
class BestPoint(Shaping):
    """c′ = −K ε r_k for the direction with the lowest loss, 0 for the others: θ − (1/K) Σ c′_k Z_k is the best point (RandOpt, 2603.12228).

    The points are θ + ε r_k Z_k, and c_k = (L(θ + ε r_k Z_k) − L(θ)) / ε. Where none has a lower loss than θ, all c′ are 0.

    Args:
        radii: r_k = radii[k mod their number].

    Raises:
        ValueError: they are no positive numbers.
    """

    radii: tuple[float, ...] = (1.0,)

    normalizes = False

    def __post_init__(self) -> None:
        known = all(isinstance(r, (int, float)) and math.isfinite(r) and r > 0 for r in self.radii)
        if not (self.radii and known):
            raise ValueError(f"radii must be positive numbers, multiples of eps, not {self.radii!r}.")

    def length(self, seed: int, step: int, direction: int) -> float:
        """r of a direction."""
        return self.radii[direction % len(self.radii)]

    @tagged("update")
    def shape(self, coefficients: Sequence[float], skipped: Sequence[bool], eps: float, state: State) -> list[float]:
        shaped = [0.0] * len(coefficients)
        lowest, best = min((c, k) for k, (c, bad) in enumerate(zip(coefficients, skipped, strict=True)) if not bad)
        if lowest < 0:
            shaped[best] = -len(coefficients) * eps * self.length(0, 0, best)
        return shaped

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        raise ValueError("learning rate 'auto' is not known for a step to the best point: 1 goes there, and eps says how far it is.")
