"""What a run's journal would hold had its steps taken the same examples in another order.

Before every step t of the run the coefficient s_tik of each example i alone was measured along the step's own directions, at the run's own
weights (:mod:`zotune.optim.slopes`). A step with another batch b then has, to first order in the distance of the weights,

    c'_tk = (1/|b|) Σ_{i in b} s_tik

The directions are the run's own, so nothing is lost to a sketch, in whatever space they lie; what is left out is the curvature, that the
other order would have been at other weights by then. The journal is replayed with c', so that real weights come out, and along the way c'
is compared with a measurement at those weights. The question is that of FUT (2505.22042).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.forward.losses import LossFunction
from zotune.optim.journal import Journal
from zotune.optim.journal_records import Record, StepRecord
from zotune.optim.optimizer import ZerothOrder
from zotune.optim.slopes import SlopeMeter

#: The rows of each step.
Order = Sequence[Sequence[int]]


@dataclass(frozen=True)
class RunSlopes:
    """A run's steps, and what each of its examples would have contributed to each of them.

    Attributes:
        records: of the journal, events too.
        slopes: s_tik of the steps that were taken, float64, (T, K, N).
        order: the examples of each step, as the run took them.
        losses: of every example before the first step and after the last, float64, (2, N).
    """

    records: Sequence[Record]
    slopes: Tensor
    order: Order
    losses: Tensor

    @property
    def steps(self) -> list[StepRecord]:
        """The records of steps."""
        return [record for record in self.records if isinstance(record, StepRecord)]

    def coefficients(self, order: Order) -> Tensor:
        """c'_tk with the examples of an order, float64, (T, K)."""
        return torch.stack([slopes[:, list(rows)].mean(dim=1) for slopes, rows in zip(self.slopes, order, strict=True)])

    @property
    def mismatch(self) -> float:
        """‖c − c'‖ / ‖c‖ of the run's own order: 0 up to rounding where the rows of its steps, and its losses, are those that were read."""
        taken = [place for place, record in enumerate(self.steps) if not any(record.skipped)]
        if not taken:
            return 0.0
        k = self.slopes.shape[1]
        recorded = torch.tensor([self.steps[place].coefficients[:k] for place in taken], dtype=torch.float64)
        norm = float(recorded.norm())
        return float((recorded - self.coefficients(self.order)[taken]).norm()) / norm if norm else 0.0

    def reordered(self, order: Order) -> Iterator[Record]:
        """The run's records with the coefficients that the order would have given. Steps that the run skipped stay skipped."""
        coefficients = self.coefficients(order)
        place = 0
        for record in self.records:
            if not isinstance(record, StepRecord):
                yield record
                continue
            kept = list(record.coefficients)
            for index, new in enumerate(coefficients[place].tolist()):
                kept[index] = kept[index] if record.skipped[index] else new
            yield record._replace(coefficients=tuple(kept))
            place += 1


@dataclass(frozen=True)
class Reordered:
    """A run replayed in another order.

    Attributes:
        losses: of every example at the end, float64, (N,).
        error: ‖c' − ĉ‖ / ‖ĉ‖ over the checked steps, ĉ measured at the weights of the replay; NaN with none.
        apart: ‖θ' − θ_T‖ / ‖θ_T − θ_0‖, how far the two runs end from each other.
    """

    losses: Tensor
    error: float
    apart: float


def measure(
    optimizer: ZerothOrder, journal: Journal, meter: SlopeMeter, order: Order, on_step: Callable[[], object] = lambda: None
) -> RunSlopes:
    """The slopes of a run, as its journal is replayed.

    Args:
        optimizer: of the run, before its first step; its model has the trained weights afterwards.
        meter: of all training examples.
        order: the examples of each step.
        on_step: called after each step.
    """
    records, slopes = list(journal.records()), []
    before = meter.losses()
    for record in records:
        if isinstance(record, StepRecord):
            slopes.append(meter.measure())
            on_step()
        optimizer.apply(record)
    return RunSlopes(records, torch.stack(slopes), order, torch.stack([before, meter.losses()]))


def replay(
    optimizer: ZerothOrder,
    run: RunSlopes,
    order: Order,
    meter: SlopeMeter,
    *,
    loss_fn: LossFunction,
    batches: Mapping[int, Sequence[Any]],
    ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
) -> Reordered:
    """Replays a run in another order, and checks the coefficients of some steps.

    Args:
        optimizer: of the run, before its first step; its model has the weights of the order afterwards.
        meter: of all training examples.
        loss_fn: the training loss.
        batches: step → micro-batches of the order, of the steps that are checked.
        ends: the weights before the run and after it, by the names of the trained parameters.
    """
    wanted, found, place = [], [], 0
    for record in run.reordered(order):
        if isinstance(record, StepRecord):
            if place in batches and not any(record.skipped):
                k = run.slopes.shape[1]
                count = len(order[place])
                found.append(SlopeMeter(optimizer, loss_fn, batches[place], count).measure().mean(dim=1))
                wanted.append(torch.tensor(record.coefficients[:k], dtype=torch.float64))
            place += 1
        optimizer.apply(record)
    losses = meter.losses()
    error = math.nan
    if found:
        true = torch.stack(found)
        error = float((torch.stack(wanted) - true).norm() / true.norm().clamp(min=1e-300))
    optimizer.remove_hooks()
    return Reordered(losses, error, _apart(optimizer, *ends))


def _apart(optimizer: ZerothOrder, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    here = dict(optimizer.model.named_parameters())
    moved = math.fsum(float((end[name].double() - start[name].double()).square().sum()) for name in end)
    other = math.fsum(float((here[name].detach().cpu().double() - end[name].double()).square().sum()) for name in end)
    return math.sqrt(other / moved) if moved else 0.0
