"""Sums over the steps between two log entries: :class:`StepSums`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from zotune.baselines import BackwardReport
from zotune.optim.state import StepReport


@dataclass
class StepSums:
    """Sums over the steps since the last log entry; a step without a finite loss counts as skipped. A checkpoint holds them."""

    steps: int = 0
    skipped: int = 0
    with_stderr: int = 0
    loss: float = 0.0
    loss_diff: float = 0.0
    loss_diff_stderr: float = 0.0
    seconds: float = 0.0
    with_diff: int = 0

    def add(self, report: StepReport | BackwardReport, seconds: float) -> None:
        """Counts one step."""
        self.steps += 1
        self.seconds += seconds
        loss = float(report.loss)
        if not math.isfinite(loss) or all(report.skipped):
            self.skipped += 1
            return
        self.loss += loss
        if report.loss_diff is not None:
            self.with_diff += 1
            self.loss_diff += float(report.loss_diff)
        if report.loss_diff_stderr is not None:
            self.with_stderr += 1
            self.loss_diff_stderr += float(report.loss_diff_stderr)

    def mean_loss(self) -> float:
        """Mean loss of the steps that were not skipped; NaN when all were, 0 without steps."""
        if not self.steps:
            return 0.0
        taken = self.steps - self.skipped
        return self.loss / taken if taken else math.nan

    def entries(self) -> dict[str, Any]:
        """The means to log: loss, loss_diff and loss_diff_stderr where there are such, skipped_steps if any, steps_per_second."""
        entries: dict[str, Any] = {}
        taken = self.steps - self.skipped
        if taken:
            entries = {"loss": self.loss / taken}
        if self.with_diff:
            entries["loss_diff"] = self.loss_diff / self.with_diff
        if self.with_stderr:
            entries["loss_diff_stderr"] = self.loss_diff_stderr / self.with_stderr
        if self.skipped:
            entries["skipped_steps"] = self.skipped
        if self.seconds:
            entries["steps_per_second"] = round(self.steps / self.seconds, 3)
        return entries

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain data."""
        return asdict(self)
