"""The signal's part of a step's coefficients where losses do not show it: a guess, corrected by the falls of the loss.

A step of rate η should lower the loss by ½ η s, and η is proportional to s, so a guess of 2s expects four times the fall. Losses of single
examples hide the fall of one step, but not that of many: once a window of steps should have lowered the loss by more than the error of its
mean, the means of two windows show how much of it came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from zotune.optim.calibration.running_mean import RunningMean

#: The first guess, and the largest.
FIRST, MOST = 0.125, 0.5
#: Standard errors that an expected fall has to exceed to be compared, and by which a loss has risen for sure.
VISIBLE, RISEN = 2.0, 2.5
#: Steps of a window, at least.
SHORTEST = 6


@dataclass
class GuessedSignal:
    """s / M from the falls of the loss.

    Attributes:
        signal: s / M.
        held: whether it is corrected; else it is constant.
        earlier, later: losses of the last complete window of steps, and of the current one.
        expected_earlier, expected: the falls expected of their steps.
    """

    signal: float = FIRST
    held: bool = True
    earlier: RunningMean = field(default_factory=lambda: RunningMean(0.0))
    later: RunningMean = field(default_factory=lambda: RunningMean(0.0))
    expected_earlier: float = 0.0
    expected: float = 0.0

    def reset(self) -> None:
        """Start again: other steps have changed the loss."""
        self.earlier, self.later = RunningMean(0.0), RunningMean(0.0)
        self.expected_earlier = self.expected = 0.0

    def expect(self, fall: float) -> None:
        """Record the expected fall of a step."""
        self.expected += fall

    def record(self, loss: float) -> None:
        """Record the loss before the next step, and correct the guess where the falls show it."""
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
            came = fall / max(1e-30, 0.5 * (self.expected_earlier + self.expected))  # from the middle of a window to that of the next
            factor = 0.25 if came < 0 else 0.5 if came < 0.5 else 2.0 if came > 1.5 else 1.0
            self.signal = min(MOST, factor * self.signal)
        self.earlier, self.expected_earlier = self.later, self.expected
        self.later, self.expected = RunningMean(0.0), 0.0

    @classmethod
    def restored(cls, state: dict[str, Any]) -> GuessedSignal:
        """From the result of ``dataclasses.asdict``."""
        return cls(**{**state, "earlier": RunningMean(**state["earlier"]), "later": RunningMean(**state["later"])})
