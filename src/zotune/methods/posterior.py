"""Coefficients as the slopes that are most probable after a step's observations (BSZO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from zotune.io.memory_tags import tagged
from zotune.methods.coefficients import Shaping, State

#: σ of the prior and of the noise at the start, unless given: √(n / this) for n trained weights.
ELEMENTS = 1e6
#: The noise is at least this part of that at the start.
FLOOR = 0.1


@dataclass(frozen=True)
class ByPosterior(Shaping):
    """c′ = K μ, μ the posterior mean of a step's K slopes a ~ N(0, σ_p² I), observed as c = a + noise (BSZO, 2601.01452).

    Every direction is observed once, in order; then, ``reuse`` times, the one whose slope is least certain (the last of equals), with the
    same c again. An observation of direction i, whose slope has the mean μ and the variance Σ (0 and σ_p² at first):

        s ← (1 − α) s + α (c − μ)²,   σ² = max(σ_0² / 100, s),   G = Σ / (Σ + σ²),   μ ← μ + G (c − μ),   Σ ← (1 − G) Σ

    s is the state, σ_0² at first. Directions that were skipped are not observed. Along the axes the covariance stays diagonal.

    Args:
        prior, noise: σ_p and σ_0; ``"auto"``: √(n / 10⁶) for n trained weights, 1 as long as n is not known.
        alpha: α in (0, 1].
        reuse: observations beyond the first of each direction.

    Raises:
        ValueError: an argument is out of its range.
    """

    prior: float | str = "auto"
    noise: float | str = "auto"
    alpha: float = 0.1
    reuse: int = 1

    normalizes = False

    def __post_init__(self) -> None:
        for name, value in (("prior", self.prior), ("noise", self.noise)):
            if value != "auto" and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number or 'auto', not {value!r}.")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], not {self.alpha!r}.")
        if not (isinstance(self.reuse, int) and self.reuse >= 0):
            raise ValueError(f"reuse must be a whole number of at least 0, not {self.reuse!r}.")

    def sized(self, elements: int) -> ByPosterior:
        deviation = math.sqrt(elements / ELEMENTS)
        prior, noise = (deviation if value == "auto" else value for value in (self.prior, self.noise))
        return replace(self, prior=prior, noise=noise)

    def scalars(self, directions: int) -> int:
        return 1

    @tagged("update")
    def shape(self, coefficients: Sequence[float], skipped: Sequence[bool], eps: float, state: State) -> list[float]:
        prior, first = (1.0 if isinstance(value, str) else value for value in (self.prior, self.noise))
        count = len(coefficients)
        means, variances = [0.0] * count, [0.0 if bad else prior * prior for bad in skipped]
        s = state.get("s", first * first)
        for place in range(count + self.reuse):
            i = place if place < count else max(range(count), key=lambda k: (variances[k], k))
            if skipped[i]:
                continue
            residual = coefficients[i] - means[i]
            s += self.alpha * (residual * residual - s)
            gain = variances[i] / (variances[i] + max((FLOOR * first) ** 2, s))
            means[i] += gain * residual
            variances[i] *= 1 - gain
        state["s"] = s
        return [count * mean for mean in means]

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        # One over the shrinkage of coefficients of the usual size, at the noise so far.
        usual = [math.sqrt(moment)] * directions
        shaped = self.shape(usual, [False] * directions, eps, dict(state))
        total = math.fsum(shaped)
        return math.fsum(usual) / total if total > 0 else 1.0
