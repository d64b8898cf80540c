"""How much of a step's coefficients is signal, where no losses can tell: a guess that is held to what comes of it.

A step of rate η is expected to lower the loss by ½ η s, and η goes by s, so whoever takes s to be twice what it is expects four times the
fall. Losses of single examples hide the fall of a step, but not that of many: as soon as a stretch of steps should have lowered the loss by
more than its mean is uncertain, the means of two stretches tell how much of it came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from zotune.optim.calibration.running_mean import RunningMean

#: What is guessed at first, and what is guessed at most.
FIRST, MOST = 0.125, 0.5
#: Standard errors that an expected fall has to exceed for what came to be compared with it, and by which a loss has risen for sure.
VISIBLE, RISEN = 2.0, 2.5
#: Steps of a stretch, at least.
SHORTEST = 6


@dataclass
class GuessedSignal:
    """s / M by what steps achieve.

    Attributes:
        signal: s / M.
        held: whether it is held to what comes of it; else it stays as it is.
        earlier, later: losses of the last whole stretch of steps, and of the one that runs.
        expected_earlier, expected: by how much their steps should have lowered the loss.
    """

    signal: float = FIRST
    held: bool = True
    earlier: RunningMean = field(default_factory=lambda: RunningMean(0.0))
    later: RunningMean = field(default_factory=lambda: RunningMean(0.0))
    expected_earlier: float = 0.0
    expected: float = 0.0

    def reset(self) -> None:
        """Others have moved the loss."""
        self.earlier, self.later = RunningMean(0.0), RunningMean(0.0)
        self.expected_earlier = self.expected = 0.0

    def expect(self, fall: float) -> None:
        """A step is taken that should lower the loss by so much."""
        self.expected += fall

    def record(self, loss: float) -> None:
        """Take in the loss before the next step, and correct the guess where that can be done."""
        if not self.held:
            return
        self.later.add(loss)
        if self.later.count < SHORTEST:
            return
        fall = self.earlier.mean - self.later.mean
        risen = self.earlier.count > 0 and -fall > RISEN * math.hypot(self.earlier.error, self.later.error)
        if not risen and self.expected < VISIBLE * math.sqrt(2) * self.later.error:
            return
        if self.earlier.count:
            came = fall / max(1e-30, 0.5 * (self.expected_earlier + self.expected))  # from the middle of a stretch to that of the next
            factor = 0.25 if came < 0 else 0.5 if came < 0.5 else 2.0 if came > 1.5 else 1.0
            self.signal = min(MOST, factor * self.signal)
        self.earlier, self.expected_earlier = self.later, self.expected
        self.later, self.expected = RunningMean(0.0), 0.0

    @classmethod
    def restored(cls, state: dict[str, Any]) -> GuessedSignal:
        """From plain data, as ``dataclasses.asdict`` makes it."""
        return cls(**{**state, "earlier": RunningMean(**state["earlier"]), "later": RunningMean(**state["later"])})
