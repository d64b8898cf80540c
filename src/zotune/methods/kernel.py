"""Kernels: finite differences over random lengths, weighted so that their leading error vanishes on average (KerZOO)."""

from __future__ import annotations

from dataclasses import dataclass

from zotune.io.suggest import did_you_mean_or
from zotune.methods.coefficients import CoefficientTransform, State
from zotune.rng.counter import Key, stream

#: E[r² K(r)²] of a kernel: the second moment of the estimate over that at r = 1 and K = 1.
MOMENTS = {"cubic": 6.25, "linear": 1.8}


@dataclass(frozen=True)
class Kernel(CoefficientTransform):
    """c′ = K(r) c, c a difference over ε r, r ~ U[−1, 1] for every direction (KerZOO, 2505.18886).

    ``"cubic"``: K(r) = (15/4) r (5 − 7 r²), with E[r K] = 1 and E[r³ K] = 0; ``"linear"``: K(r) = 3 r, with E[r³ K] = 3/5.

    Args:
        kind: a name of :data:`MOMENTS`.

    Raises:
        ValueError: it is none.
    """

    kind: str = "cubic"

    def __post_init__(self) -> None:
        if self.kind not in MOMENTS:
            raise ValueError(f"unknown kernel {self.kind!r}{did_you_mean_or(self.kind, MOMENTS, 'choose one of')}")

    def length(self, seed: int, step: int, direction: int) -> float:
        """r of a direction, a function of its key."""
        return (stream(Key(seed, step, direction, "", "length")) >> 11) * 2.0**-52 - 1.0

    def weight(self, r: float) -> float:
        """K(r)."""
        return 15 / 4 * r * (5 - 7 * r * r) if self.kind == "cubic" else 3 * r

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        # Where noise limits the rate; the mean is the gradient's.
        return 1 / MOMENTS[self.kind]
