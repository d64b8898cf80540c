"""Following: a run that was cut off takes its first steps from the journal it left, and evaluates nothing for them.

The loop around the optimiser (data order, schedule, log) goes through the same motions as in the run that was cut off, so nothing of it
has to be restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune import applying
from zotune.journal import Record, StepRecord
from zotune.stacking import NotStackable, batch_rows

if TYPE_CHECKING:
    from zotune.optimizer import ZerothOrder

#: Steps between two records of everything that is known about the rate, where it is measured: a run goes on from one of them.
KEPT = 200


def usable(records: Sequence[Record], measured: bool) -> int:
    """How many of these records a run can follow: whole steps, and where steps go by what was ``measured``, a rate or the scale of
    guided ones, up to the last record that says all that was known."""
    for count in range(len(records), 0, -1):
        last = records[count - 1]
        if measured and isinstance(last, dict) and ("state" in last or "guidance" in last):
            return count
        if not measured and isinstance(last, StepRecord):
            return count
    return 0


def step(optimizer: ZerothOrder, parts: list[Any] | None) -> tuple[Tensor | None, bool]:
    """Take the next step from the records that are left to follow.

    Returns:
        The step's loss, None if no record of it is left; and then whether what comes before its evaluations has been done.
    """
    ready = False
    tail = optimizer.tail
    while tail:
        record = tail.pop(0)
        if isinstance(record, StepRecord):
            return _take(optimizer, record, parts), True
        optimizer.forward_passes += record.get("forwards", 0)
        optimizer.sequences_evaluated += record.get("sequences", 0)
        if "state" in record and optimizer.calibrator is not None:
            optimizer.calibrator.restore(record["state"])
        if "guidance" in record and optimizer.guidance is not None:
            optimizer.guidance.restore(record["guidance"])
        applying.take_event(optimizer, record)
        # A fold is the user's, between two steps; whatever else was written was written on the way to a step.
        ready = record.get("event") != "fold"
        optimizer._prepared = optimizer._prepared or ready
    return None, ready


def _take(optimizer: ZerothOrder, record: StepRecord, parts: list[Any] | None) -> Tensor:
    from zotune.optimizer import StepReport

    optimizer.apply(record)
    forwards = 1 if optimizer.guided else optimizer.method.forwards(record.step)
    optimizer.forward_passes += forwards
    optimizer.sequences_evaluated += forwards * _rows(parts)
    optimizer._prepared = True
    k = len(record.coefficients) // (2 if optimizer.method.estimator == "curvature" else 1)
    coefficients = torch.tensor(record.coefficients[:k], dtype=torch.float32)
    signs = optimizer.estimator.signs
    width = optimizer.eps * (max(signs) - min(signs))
    gap = None if optimizer.guided else float(coefficients.abs().mean()) * width
    optimizer.last = StepReport(optimizer.steps, record.loss, coefficients, gap, None, record.skipped[:k], record.lrs, optimizer._terms)
    return torch.tensor(record.loss)


def _rows(parts: list[Any] | None) -> int:
    try:
        return sum(batch_rows(part) for part in parts or ())
    except NotStackable:
        return len(parts or ())
