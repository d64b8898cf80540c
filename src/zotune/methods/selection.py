"""The direction of a step, chosen from several candidates by their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zotune.methods.coefficients import CoefficientTransform, State


@dataclass(frozen=True)
class Selection(CoefficientTransform):
    """c_k = M c w_k, c = (L(θ + εv) − L(θ − εv)) / 2ε along v = Σ_k w_k Z_k, w from the losses at the M points θ + εZ_k.

    The update is c v, since an estimate is the mean over its M directions. Without ``share`` w is 1 at the candidate of the lowest loss and
    0 elsewhere (MeZO-Greedy, 2601.04710).

    Args:
        share: None.
    """

    share: float | None = None

    def extra_forwards(self, step: int, points: int) -> int:
        return 2

    def weights(self, losses: Sequence[float]) -> list[float]:
        """w of candidates with these losses; of equal ones the first is the lower, and those that are not finite have 0.

        The first candidate alone where none is finite.
        """
        order = sorted((loss, k) for k, loss in enumerate(losses) if math.isfinite(loss)) or [(math.nan, 0)]
        weights = [0.0] * len(losses)
        weights[order[0][1]] = 1.0
        return weights

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        # Steps along v have the noise of one direction of the length ‖w‖, not the mean's of M.
        weights = self.weights([float(k) for k in range(directions)])
        return 1 / (directions * math.fsum(w * w for w in weights))
