"""What the steps between two log entries add up to: :class:`StepSums`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from zotune.baselines import BackwardReport
from zotune.optim.report import StepReport


@dataclass
class StepSums:
    """Sums over the steps since the last log entry. A step whose loss is not finite is counted as skipped.

    A checkpoint holds them, so the first entry after a resume averages over the same steps as in a straight run.
    """

    steps: int = 0
    skipped: int = 0
    noisy: int = 0
    loss: float = 0.0
    loss_diff: float = 0.0
    loss_diff_stderr: float = 0.0
    seconds: float = 0.0
    gapped: int = 0

    def add(self, report: StepReport | BackwardReport, seconds: float) -> None:
        """Count one step that took `seconds`."""
        self.steps += 1
        self.seconds += seconds
        loss = float(report.loss)
        if not math.isfinite(loss) or all(report.skipped):
            self.skipped += 1
            return
        self.loss += loss
        if report.loss_diff is not None:
            self.gapped += 1
            self.loss_diff += float(report.loss_diff)
        if report.loss_diff_stderr is not None:
            self.noisy += 1
            self.loss_diff_stderr += float(report.loss_diff_stderr)

    def mean_loss(self) -> float:
        """Mean loss of the steps that were not skipped; NaN when all were, 0 when there were none."""
        if not self.steps:
            return 0.0
        taken = self.steps - self.skipped
        return self.loss / taken if taken else math.nan

    def entries(self) -> dict[str, Any]:
        """The means to log: loss and loss_diff (absent when every step was skipped; a first-order step has no loss_diff), skipped_steps (or absent)."""
        entries: dict[str, Any] = {}
        taken = self.steps - self.skipped
        if taken:
            entries = {"loss": self.loss / taken}
        if self.gapped:
            entries["loss_diff"] = self.loss_diff / self.gapped
        if self.noisy:
            entries["loss_diff_stderr"] = self.loss_diff_stderr / self.noisy
        if self.skipped:
            entries["skipped_steps"] = self.skipped
        if self.seconds:
            entries["steps_per_second"] = round(self.steps / self.seconds, 3)
        return entries

    def to_dict(self) -> dict[str, Any]:
        """As plain data; ``StepSums(**sums.to_dict())`` is equal to `sums`."""
        return asdict(self)
