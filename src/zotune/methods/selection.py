"""The direction of a step, chosen from several candidates by their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zotune.methods.coefficients import CoefficientTransform, State


@dataclass(frozen=True)
class Selection(CoefficientTransform):
    """c_k = M c w_k, c = (L(θ + εv) − L(θ − εv)) / 2ε along v = Σ_k w_k Z_k, w from the losses at the M points θ + εZ_k.

    The update is c v, since an estimate is the mean over its M directions. With a ``share`` α w is 1/s at the s = ⌊αM⌋ candidates of the
    lowest losses (one at least, all but one at most) and −1/(M − s) at the others (MeZO-GV, 2601.04710); without, it is 1 at the lowest
    and 0 elsewhere (MeZO-Greedy, there too).

    Args:
        share: α in (0, 1); None: the lowest alone.

    Raises:
        ValueError: it is out of this range.
    """

    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1), not {self.share!r}.")

    def extra_forwards(self, step: int, points: int) -> int:
        return 2

    def weights(self, losses: Sequence[float]) -> list[float]:
        """w of candidates with these losses; of equal ones the first is the lower, and those that are not finite have 0.

        The first candidate alone where none is finite.
        """
        order = sorted((loss, k) for k, loss in enumerate(losses) if math.isfinite(loss)) or [(math.nan, 0)]
        weights, count = [0.0] * len(losses), len(order)
        low = 1 if self.share is None else max(1, min(int(self.share * count), count - 1))
        for place, (_, k) in enumerate(order):
            weights[k] = 1 / low if place < low else 0.0 if self.share is None else -1 / (count - low)
        return weights

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        # Steps along v have the noise of one direction of the length ‖w‖, not the mean's of M.
        weights = self.weights([float(k) for k in range(directions)])
        return 1 / (directions * math.fsum(w * w for w in weights))
