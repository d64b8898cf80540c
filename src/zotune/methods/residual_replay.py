"""The residual of quantized weights, computed from past coefficients instead of stored (QES without state)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.methods.history import CoefficientHistory, PastStep
from zotune.rng.directions import Directions
from zotune.subspaces import CodeCoordinate
from zotune.subspaces.coordinate import Coordinate


@dataclass(frozen=True)
class ResidualReplay(CoefficientHistory):
    """Q ← Q + Δ, the last Δ of the steps j = t − h + 1, ..., t of x = −η ĝ_j + γ e, Δ = round(x), e ← x − Δ (QES, 2602.03120).

    e is 0 before the first of them, in step 0 uniform in [−½, ½). Directions and ranges are those at the present Q, and η is the present
    one, in all of the steps: an approximation of the stored residual, as Q and η change slowly.
    """

    decay: float = 0.9

    replaces_rule = False

    @tagged("update")
    def update(self, coordinate: Coordinate, value: Tensor, past: Sequence[PastStep], lr: float, directions: Directions, seed: int) -> None:
        assert isinstance(coordinate, CodeCoordinate)
        rest = coordinate.first_residual(seed) if len(past) == 1 else torch.zeros_like(value)
        whole = rest
        for step in past:
            weights = [-lr * (c / len(step.coefficients)) for c in step.coefficients]
            change = coordinate.weighted(directions, weights, seed, step.step).add_(rest.mul_(self.decay))
            whole, rest = coordinate.rounded(change, value)
        value.add_(whole)
