"""Federated steps: clients evaluate the same directions on data of their own, and only journal records travel.

A round, as in DeComFL (2405.15861, with one local step): every client proposes the record of the next step, of its own losses; the server
averages the coefficients; server and clients take the averaged record. All that was sent for a step is a record of a few dozen bytes each
way, whatever the model's size, and all have the same weights bit for bit. Whoever missed rounds takes their records first.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.forward.losses import LossFunction
from zotune.optim.journal_records import CRC, HEAD, StepRecord, pack, unpack
from zotune.optim.optimizer import ZerothOrder
from zotune.optim.privacy_refusals import refusal
from zotune.optim.state import NO_BATCH, StepContext, micro_batches


@torch.no_grad()
def propose(optimizer: ZerothOrder, loss_fn: LossFunction | Callable[[], Tensor], batch: Any = NO_BATCH) -> StepRecord:
    """The record of the next step by these losses; the step is not taken, and no weight changes.

    Args:
        optimizer: with the method, seed and learning rate of all clients.
        loss_fn, batch: as of :meth:`ZerothOrder.step`.

    Raises:
        ValueError: the method, the learning rate or ε depend on the data by more than the coefficients.
    """
    check(optimizer)
    context = StepContext(optimizer.seed, optimizer.steps, loss_fn, micro_batches(batch))
    optimizer.preparation.prepare(context)
    estimate, rates = optimizer.step_estimate.measure(context, False)
    return StepRecord.of_estimate(context.step, estimate, rates)


def averaged(records: Sequence[StepRecord], weights: Sequence[float] | None = None) -> StepRecord:
    """The record with Σ w_i c_i / Σ w_i for coefficients, of the clients whose loss was finite; numbers as the journal stores them.

    Args:
        records: of the same step.
        weights: w_i, such as the numbers of examples; None: all the same.

    Raises:
        ValueError: no records, or records of different steps, learning rates or numbers of directions.
    """
    weights = [1.0] * len(records) if weights is None else [float(weight) for weight in weights]
    if not records or len(weights) != len(records) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError("averaged() needs at least one record, and for each a weight of at least 0, not all 0.")
    first = records[0]
    if any((record.step, record.lrs, len(record.coefficients)) != (first.step, first.lrs, len(first.coefficients)) for record in records):
        raise ValueError("the records are of different steps, learning rates or numbers of directions: they are not of one round.")
    coefficients, skipped = [], []
    for k in range(len(first.coefficients)):
        known = [
            (weight, record.coefficients[k]) for weight, record in zip(weights, records, strict=True) if not record.skipped[k] and weight
        ]
        total = sum(weight for weight, _ in known)
        coefficients.append(sum(weight * value for weight, value in known) / total if known else 0.0)
        skipped.append(not known)
    finite = [(weight, record.loss) for weight, record in zip(weights, records, strict=True) if not all(record.skipped)]
    loss = sum(weight * value for weight, value in finite) / (sum(weight for weight, _ in finite) or 1.0) if finite else float("nan")
    (rounded,) = unpacked(packed([StepRecord(first.step, first.lrs, loss, tuple(coefficients), tuple(skipped))]), len(first.lrs))
    return rounded


@torch.no_grad()
def take(optimizer: ZerothOrder, records: Iterable[StepRecord]) -> None:
    """Take steps by their records: they go to the optimizer's journal, and the weights follow.

    Raises:
        ValueError: a record is not of the next step.
        NonFiniteLossError: too many steps in a row had no finite loss.
    """
    check(optimizer)
    state = optimizer.run.state
    for record in records:
        if record.step != state.steps or len(record.lrs) != len(optimizer.param_groups):
            raise ValueError(f"the record of step {record.step} does not follow {state.steps} steps of this run.")
        state.write(record)
        optimizer.apply(record)
        state.check_finite(record.step, optimizer.max_nonfinite_steps)


def packed(records: Iterable[StepRecord]) -> bytes:
    """Records as the bytes of a journal, each with its checksum."""
    return b"".join(map(pack, records))


def unpacked(data: bytes, groups: int = 1) -> list[StepRecord]:
    """The records of :func:`packed`; ``groups``: parameter groups of the run.

    Raises:
        ValueError: the bytes are damaged, or hold anything but steps.
    """
    records, place = [], 0
    while place < len(data):
        try:
            kind, size = HEAD.unpack_from(data, place)
            end = place + HEAD.size + size
            if CRC.unpack_from(data, end)[0] != zlib.crc32(data[place:end]):
                raise ValueError("wrong checksum")
            record = unpack(kind, data[place + HEAD.size : end], groups)
        except (struct.error, ValueError, KeyError) as error:
            raise ValueError(f"the records that were sent are damaged at byte {place}: {error}.") from None
        if not isinstance(record, StepRecord):
            raise ValueError(f"the records that were sent hold an event at byte {place}, and steps alone are taken.")
        records.append(record)
        place = end + CRC.size
    return records


def check(optimizer: ZerothOrder) -> None:
    """ValueError where clients with other data would not follow the same records."""
    reason = refusal(optimizer.method)
    if reason is not None:  # what would be released is what clients would not share
        raise ValueError(
            f"{optimizer.method.name} cannot be federated, as its steps read data by more than their coefficients: take lozo or mezo."
        )
    if optimizer.calibrator is not None:
        raise ValueError("clients with data of their own would measure different rates: give lr and eps as numbers.")
    if optimizer.private is not None or optimizer.workers.several:
        raise ValueError("a federated client is one process, without ZerothOrder's privacy: leave workers and privacy out.")
