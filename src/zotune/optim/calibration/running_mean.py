"""A mean with forgetting."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class RunningMean:
    """A mean with forgetting: a new value weighs 1 / count, but never below ``forgetting``. Its variance is kept too."""

    forgetting: float
    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    def add(self, number: float) -> None:
        if not math.isfinite(number):
            return
        self.count += 1
        weight = max(1 / self.count, self.forgetting)
        self.mean += weight * (number - self.mean)
        self.square += weight * (number * number - self.square)

    @property
    def variance(self) -> float:
        return max(0.0, self.square - self.mean**2)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        effective = min(self.count, 2 / self.forgetting - 1) if self.forgetting else self.count
        return math.sqrt(self.variance / max(1.0, effective - 1))
