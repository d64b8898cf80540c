"""Variance reduction by a snapshot of the weights: MeZO-SVRG (2404.08080).

A period begins with ``batches`` steps at the snapshot θ̄ = θ, a batch each, along one direction. They make an estimate g of the gradient
there; the last of them updates by g. Then come ``interval`` steps that update by ĝ(θ) − ĝ(θ̄) + g, with the same batch and the same
direction at both points, so that the batch's own noise cancels. g is a pure function of the period's first key and its K mean coefficients,
and is not stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zotune.forward.losses import Losses
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate, Estimator
from zotune.methods.history import PastStep
from zotune.methods.svrg import SVRGSchedule
from zotune.optim.evaluator import Evaluator
from zotune.optim.journal_records import StepRecord
from zotune.optim.state import RunState, StepContext
from zotune.optim.step_transforms import StepTransform, Terms
from zotune.rng.directions import Directions
from zotune.subspaces.coordinate import Coordinate, Offset


class SnapshotCoordinate:
    """In place of a coordinate while the snapshot is evaluated: its weight is the snapshot's."""

    def __init__(self, coordinate: Coordinate, snapshot: Tensor) -> None:
        self.name, self.coordinate, self.snapshot = coordinate.name, coordinate, snapshot

    def is_active(self, step: int, direction: int) -> bool:
        return self.coordinate.is_active(step, direction)

    @tagged("update")
    def at(self, directions: Directions, offset: Offset) -> Tensor:
        change = directions.combine([(offset.key(self.name), offset.scale)], self.coordinate.shape, self.coordinate.device)
        return change.add_(self.snapshot).to(self.coordinate.parameter.dtype)


class SVRGCorrection(StepTransform):
    """c_k less the coefficient at the snapshot θ̄ on the same batch, and g beside it.

    Attributes:
        weights: θ̄ by coordinate, float32.
        sums, count: sums of the coefficients at θ̄ in this period, and the number of batches they come from.
    """

    name = "svrg"

    def __init__(self, schedule: SVRGSchedule, evaluator: Evaluator, estimator: Estimator, state: RunState) -> None:
        self.schedule, self.evaluator, self.estimator, self.run_state = schedule, evaluator, estimator, state
        self.weights: dict[str, Tensor] = {}
        self.sums: list[float] = []
        self.count = 0

    def evaluated_at(self, context: StepContext) -> StepContext:
        return context.at(self.schedule.key_step(context.step))

    @tagged("update")
    def before_journal(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        if self.schedule.at_snapshot(context.step):
            return estimate
        forward, evaluate, eps = self.evaluator.forward, self.evaluator.function(context), self.run_state.eps
        count = len(estimate.coefficients)
        with forward.replace_coordinates({c.name: SnapshotCoordinate(c, self.weights[c.name]) for c in forward.coordinates}):
            offsets = [Offset(p.sign * eps, context.seed, context.step, p.direction) for p in self.estimator.points(count)]
            found = torch.stack([forward.evaluate(evaluate, offset) for offset in offsets])
        snapshot = Losses(found, None, count, found.numel()).counted(context.loss_fn).estimate(self.estimator, eps)
        skipped = tuple(a or b for a, b in zip(estimate.skipped, snapshot.skipped, strict=True))
        difference = (estimate.coefficients - snapshot.coefficients).masked_fill(torch.tensor(skipped), 0.0)
        self.run_state.sequences_evaluated += found.numel()
        return estimate._replace(coefficients=difference, skipped=skipped)

    @tagged("update")
    def after_journal(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        past = terms.terms[0]
        position = self.schedule.position(past.step)
        if not self.schedule.at_snapshot(past.step):
            return Terms((past, PastStep(past.step - position, self._mean())))
        if position == 0:
            self.sums, self.count = [0.0] * len(past.coefficients), 0
        if not skipped:
            self.sums = [a + b for a, b in zip(self.sums, past.coefficients, strict=True)]
            self.count += 1
        if position < self.schedule.batches - 1:
            return Terms(())
        self.weights = {c.name: c.value().detach().clone() for c in self.evaluator.forward.coordinates}
        return Terms((PastStep(past.step - position, self._mean()),), self.schedule.ratio)

    def _mean(self) -> tuple[float, ...]:
        return tuple(s / max(1, self.count) for s in self.sums)

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count}

    def tensors(self) -> dict[str, Tensor]:
        return self.weights

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.sums, self.count = list(state["sums"]), state["count"]
        coordinates = self.run_state.by_name()
        self.weights = {name: tensor.to(coordinates[name].device, copy=True) for name, tensor in tensors.items()}
