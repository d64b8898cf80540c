"""Resuming along a journal: a run that was interrupted takes its first steps from its journal, without evaluations.

The loop around the optimizer (data order, schedule, log) runs as before, so none of its state has to be restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zotune.errors import NotBatchableError
from zotune.forward.batches import batch_rows
from zotune.optim.construction import RunParts
from zotune.optim.journal_records import Record, StepRecord
from zotune.optim.state import StepReport
from zotune.optim.update import Updater


def usable(records: Sequence[Record], measured: bool) -> int:
    """How many of these records a run can resume along: complete steps.

    Where rates or the scale of output gradients are ``measured``, up to the last record with the complete state of the measurements.
    """
    for count in range(len(records), 0, -1):
        last = records[count - 1]
        if measured and isinstance(last, dict) and ("state" in last or "output_gradients" in last):
            return count
        if not measured and isinstance(last, StepRecord):
            return count
    return 0


class Resume:
    """Takes steps from the records that the state holds as its tail."""

    def __init__(self, run: RunParts, updater: Updater) -> None:
        self.run, self.updater = run, updater

    def step(self, parts: list[Any] | None) -> tuple[StepReport | None, bool]:
        """Take the next step from the remaining records.

        Returns:
            The step's report, None if no record of it remains; and whether its preparation is done then.
        """
        ready = False
        run, state = self.run, self.run.state
        while state.tail:
            record, state.tail = state.tail[0], state.tail[1:]
            if isinstance(record, StepRecord):
                return self._take(record, parts), True
            state.count(record.get("forwards", 0), record.get("sequences", 0))
            if "state" in record and run.calibrator is not None:
                run.calibrator.restore(record["state"])
            if "output_gradients" in record and run.output_gradients is not None:
                run.output_gradients.restore(record["output_gradients"])
            self.updater.apply_event(record)
            # A fold is the user's, between two steps; every other event belongs to the preparation of a step.
            ready = record.get("event") != "fold"
            state.prepared = state.prepared or ready
        return None, ready

    def _take(self, record: StepRecord, parts: list[Any] | None) -> StepReport:
        run, state = self.run, self.run.state
        self.updater.apply(record)
        forwards = 1 if run.along_output_gradients else run.method.forwards(record.step)
        state.count(forwards, forwards * (_rows(parts) if run.private is None else run.private.privacy.batch_size))
        state.prepared = True
        k = run.directions_in(record)
        coefficients = torch.tensor(record.coefficients[:k], dtype=torch.float32)
        signs = run.estimator.signs
        width = state.eps * (max(signs) - min(signs))
        loss_diff = None if run.along_output_gradients else float(coefficients.abs().mean()) * width
        return StepReport(state.steps, record.loss, coefficients, loss_diff, None, record.skipped[:k], record.lrs, state.terms)


def _rows(parts: list[Any] | None) -> int:
    try:
        return sum(batch_rows(part) for part in parts or ())
    except NotBatchableError:
        return len(parts or ())
