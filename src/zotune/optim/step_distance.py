"""How far a normalized step along output gradients goes: a part of the way to the minimum of the loss along a run's first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.optim.calibration.running_mean import RunningMean
from zotune.optim.calibration.step_size import StepSize

#: Distance at which a normalized step's slope and curvature are measured first. P and V are orthonormal there: an S of norm 1 spread over
#: all layers changes the loss of a batch by a few tenths of a nat at first, well above the rounding of half precision and of engines.
FAR = 0.3
#: Factor of the distance at which a slope is measured again if steps would go elsewhere; how often, at most.
FARTHER, MAX_SAMPLES = 8.0, 6
#: How far a normalized step of 16 examples goes, as a part of the way to the minimum of the loss along the first one.
PART_OF_WAY = 0.05


class Sample(NamedTuple):
    """Losses on both sides of θ: slope, curvature of each example's loss (N,), how far the loss falls on one, whether all are finite."""

    slope: float
    curvature: Tensor
    lower: float
    finite: bool


@dataclass
class StepDistance:
    """The distance in S of all layers.

    Attributes:
        value: 0 before it is measured.
    """

    value: float = 0.0

    @tagged("activations")
    def measure(
        self,
        sample: Callable[[float], Sample],
        predicted: float,
        examples: int,
        size: StepSize,
        scale: RunningMean,
        measured: bool,
        rounds: bool,
    ) -> None:
        """Measure it where a step goes; later that the loss falls there.

        Args:
            sample: looks so far to both sides along the step.
            predicted: the slope by the derivatives that feedback gives.
            examples: of the batch.
            size: takes the curvature and the distance.
            scale: takes the true slope over the predicted one.
            measured: whether rates are; else the scale alone is.
            rounds: whether the engine rounds activations.
        """
        least = FAR if rounds else 0.0
        radius = max(self.value, least) or FAR
        for _ in range(MAX_SAMPLES):
            seen = sample(radius)
            if not seen.finite:
                radius /= FARTHER
                self.value = min(self.value, radius)
                continue
            size.sample_at(radius)
            size.record_curvature(seen.curvature.unsqueeze(0))
            scale.add(seen.slope / max(predicted, 1e-30))
            if not measured or seen.slope <= 0:
                break
            if self.value:
                self.value *= 1.0 if seen.lower > 0 else 0.5
                break
            wanted = max(least, part_of_way(seen, size, examples))
            if radius / FARTHER <= wanted <= FARTHER * radius:
                self.value = wanted
                break
            radius = radius * FARTHER if wanted > radius else max(least, radius / FARTHER)
        else:  # a loss without a valley
            self.value = self.value or PART_OF_WAY * radius
        size.stride = self.value


def part_of_way(seen: Sample, size: StepSize, examples: int) -> float:
    """A part of the distance to the minimum of a parabola through three losses; less of it for a batch whose direction is noise."""
    curvature = max(size.curvature.mean + size.curvature.error, 0.2 * math.sqrt(max(0.0, size.spread.mean)))  # not that of a saddle
    return PART_OF_WAY * min(2.0, math.sqrt(examples / 16)) * seen.slope / max(curvature, 1e-30)
