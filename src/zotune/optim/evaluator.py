"""The losses of a step: all points in one forward of stacked rows (*batched*), or one point after the other (*sequential*).

Both give the same losses up to rounding. Batched reads every weight once for all points; sequential needs the activations of one batch
only. Where examples have directions of their own, a point is one forward of the batch all the same (*rowwise*), each row under its own
direction; a model that mixes its rows has the examples of each direction evaluated alone. Batched needs examples that can be told apart
and one loss per example. Modules that use their weights in a way without a batched form are called once for each point (``by_block``).
With shared directions, a matrix in full space is evaluated one point after the other.

:mod:`zotune.optim.evaluation_choice` makes the choice at the first step, once a run. A checkpoint holds it, and the journal has an event
where it is sequential, since the losses differ in their last bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward.batches import PARTS_PER_DIRECTION, Assignment
from zotune.forward.cuda_graphs import CudaGraphs
from zotune.forward.losses import Losses, as_losses, evaluation
from zotune.forward.model import PerturbedForward
from zotune.io.memory_tags import tagged
from zotune.methods import Method
from zotune.methods.estimators import Estimator, Point
from zotune.optim.batched_forward import BatchedForward
from zotune.optim.distributed.workers import Workers
from zotune.optim.evaluation_choice import Chooser, EvaluationChoice, worker_chunk
from zotune.optim.state import RunState, StepContext
from zotune.optim.work import Work, split, split_assigned
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.weights.computed_linear import ONE_POINT

#: Values of the option ``forward_batching``.
FORWARD_BATCHING = ("auto", "batched", "sequential")


class Evaluator:
    """Evaluates the losses of steps.

    Args:
        forward: evaluates the model.
        method: says which points.
        estimator: the method's.
        requested: one of :data:`FORWARD_BATCHING`.
        state: of the run, for ε.
        workers: who evaluate a share of a step each; None: one worker.
        cuda_graphs: see :mod:`zotune.forward.cuda_graphs`.

    Raises:
        ValueError: another value of ``requested``; ``"batched"``, and a parameter cannot be evaluated at several points at once.
    """

    def __init__(
        self,
        forward: PerturbedForward,
        method: Method,
        estimator: Estimator,
        requested: str,
        state: RunState,
        workers: Workers | None = None,
        cuda_graphs: bool | str = "auto",
    ) -> None:
        if requested not in FORWARD_BATCHING:
            raise ValueError(f"unknown forward_batching {requested!r}; choose one of {', '.join(FORWARD_BATCHING)}.")
        one = requested == "batched" and method.num_directions == 1 and forward.batches_dense
        self._possible = forward.dense is None or method.own or one
        if forward.dense is not None and (method.own or not self._possible):
            _about_dense(forward.dense, method, requested)
        self.forward, self.method, self.estimator, self.requested, self.state = forward, method, estimator, requested, state
        self.workers = workers or Workers()
        wide = any(coordinate.parameter.dtype == torch.float64 for coordinate in forward.coordinates)
        self.workers.loss_dtype = torch.float64 if wide else torch.float32
        self.graphs = CudaGraphs(forward, cuda_graphs if method.lengths is None else False)  # scales are constants of a graph
        self.batched_forward = BatchedForward(forward, self.graphs, state)
        self.chooser = Chooser(self.batched_forward, method, estimator, self.workers, requested)
        self._alone = forward.sharded or forward.by_engine  # one point at a time
        if forward.by_engine and requested == "batched":
            raise ValueError(ONE_POINT)
        self.choice = EvaluationChoice(
            batched=None if requested != "sequential" and self._possible and not self._alone else False,
            rowwise=None if method.own and not self._alone else False,
        )

    @property
    def batched(self) -> bool | None:
        """Whether all points are evaluated in one forward; None before the first step."""
        return self.choice.batched

    @property
    def rowwise(self) -> bool | None:
        """Whether the rows of a forward can be under different directions; None before the first step."""
        return self.choice.rowwise

    def restore(self, batched: bool | None, rowwise: bool | None) -> None:
        """Continue with the run's choice, unless another one was requested."""
        if self._alone:
            return
        if self.requested != "sequential" and self._possible:
            self.choice = replace(self.choice, batched=batched)
        if self.method.own:
            self.choice = replace(self.choice, rowwise=rowwise)

    # -- a step ---------------------------------------------------------------------------------------------------------------------

    def evaluate(self, context: StepContext) -> Losses:
        """The losses of a step. Where the choice becomes sequential, the journal gets an event.

        Raises:
            ValueError: the loss has no shape that the method can use.
        """
        before = self.batched, self.rowwise
        losses = self._evaluate(context)
        if any(now is False and was is not False for now, was in zip((self.batched, self.rowwise), before, strict=True)):
            rowwise = {"rowwise": bool(self.rowwise)} if self.method.own else {}
            self.state.write({"event": "forward_batching", "batched": bool(self.batched), **rowwise})
        return losses

    def evaluate_apart(self, context: StepContext) -> Losses:
        """The losses of a step that leaves no event, and whose batch does not change how later ones are evaluated."""
        before = self.choice
        try:
            return self._evaluate(context)
        finally:
            self.choice = before

    @tagged("activations")
    def _evaluate(self, context: StepContext) -> Losses:
        if self.method.own:
            return self._assigned(context, self.estimator.signs, self.method.num_directions)
        if self.method.estimator == "tangent":
            return self._tangents(context)
        directions = self.method.directions_of(0)
        points = self._points(context, directions)
        if self.batched is None:
            self._choose(context)
        work = self._work(context, len(points))
        values = self._values(context, work, [points[number] for number in work.share.points]) if work.share.pieces else None
        values, evaluated = work.gather(values)
        return Losses(values, None, directions, evaluated)

    def _points(self, context: StepContext, directions: int) -> list[Point]:
        points, length = self.estimator.points(directions), self.method.lengths
        if length is None:
            return points
        return [Point(p.sign * length(context.seed, context.step, p.direction), p.direction) for p in points]

    def _values(self, context: StepContext, work: Work, points: Sequence[Point]) -> Tensor:
        """Losses (P, n) of this worker's pieces at its points."""
        forward, pieces = self.batched_forward, work.pieces
        if self.batched and pieces is not None:
            try:
                return torch.cat([forward.at_points(context, piece, points) for piece in pieces], dim=1)
            except NotBatchableError as error:
                self._take(self.choice.give_up(str(error)))
        if pieces is not None and self.graphs.enabled:
            values = forward.one_by_one_from_graphs(context, pieces, points)
            if values is not None:
                return values
        evaluate, eps = work.losses, self.state.eps
        offsets = [Offset(point.sign * eps, context.seed, context.step, point.direction) for point in points]
        return torch.stack([self.forward.evaluate(evaluate, offset) for offset in offsets])

    @tagged("activations")
    def _tangents(self, context: StepContext) -> Losses:
        """Losses and their derivatives along every direction, 2K rows."""
        directions = self.method.directions_of(0)
        work = self._work(context, directions)
        calls, rows = work.calls, []
        for direction in work.share.points if calls else ():
            found = [self.forward.tangent(call, Offset(0.0, context.seed, context.step, direction)) for call in calls]
            rows += [as_losses([loss for loss, _ in found]), as_losses([tangent for _, tangent in found])]
        values, evaluated = work.gather(torch.stack(rows) if rows else None, each=2)
        return Losses(values, None, directions, evaluated // 2)

    @tagged("activations")
    def _assigned(self, context: StepContext, signs: Sequence[float], each: int, parts_per_direction: int = 1) -> Losses:
        """Losses of groups of examples, or of every example, under ``each`` directions of their own."""
        try:
            if context.parts is None:
                raise NotBatchableError("a closure has no batch")
            groups_of = lambda rows: max(1, self.method.parts(rows) // parts_per_direction)  # noqa: E731
            work = split_assigned(self.workers, context.parts, groups_of, each)
        except NotBatchableError as error:
            raise ValueError(
                f"directions_per={self.method.directions_per!r} needs a batch of tensors with the examples along dimension 0, but {error}; "
                "call step(loss_fn, batch), or set directions_per to 'batch'."
            ) from None
        if self.choice.undecided or not self.choice.checked:
            self._choose(context, work.first)
        forward, values, evaluated = self.batched_forward, None, 0
        if self.rowwise and work.pieces:
            try:
                found = [forward.rowwise(context, part, pairs, signs, bool(self.batched)) for part, pairs in work.pieces]
                values = torch.cat([losses for losses, _ in found], dim=1)
                evaluated = sum(count for _, count in found)
            except NotBatchableError as error:
                self._take(self.choice.give_up(str(error)))
        if work.pieces and values is None:
            values = torch.cat([forward.by_direction(context, part, pairs, signs) for part, pairs in work.pieces], dim=1)
            evaluated = values.numel()
        values, evaluated = self.workers.gather(work.share, values, evaluated, each=len(signs))
        return Losses(values, work.owners, work.num_directions, evaluated)

    # -- for measurements ---------------------------------------------------------------------------------------------------------------

    def function(self, context: StepContext) -> Callable[[], Tensor]:
        """A function without arguments that evaluates the losses of the step's examples, those of all workers, float32, (N,)."""
        work = self._work(context, 1)
        if not self.workers.several:
            return work.losses
        return lambda: work.gather(work.losses().unsqueeze(0) if work.share.pieces else None)[0][0]

    @tagged("activations")
    def table(self, context: StepContext, each: int, rows_of: Callable[[Callable[[], Any]], Tensor]) -> tuple[Tensor, int]:
        """The table (each, N) of what ``rows_of`` makes of every micro-batch's losses, and the sequences evaluated for it.

        Args:
            rows_of: (each, n) of a function that evaluates the losses of n examples, as the loss function returns them.
        """
        work = self._work(context, 1)
        found = [rows_of(call) for call in work.calls]
        values, evaluated = work.gather(torch.cat(found, dim=1) if found else None, each)
        return values, evaluated // each

    def trial(self, context: StepContext) -> Callable[[], Tensor]:
        """A function without arguments that evaluates losses of this worker alone, to compare evaluations."""
        context = context.smooth
        parts = context.parts
        return evaluation(context.loss_fn, None if parts is None else [worker_chunk(self.workers, part)[0] for part in parts])

    def around(self, context: StepContext, scale: float = 1) -> Losses:
        """The losses at θ and θ ± scale · εZ, (3, N), one Z per :data:`PARTS_PER_DIRECTION` neighboring groups of examples."""
        return self._assigned(context, (0, +scale, -scale), 1, PARTS_PER_DIRECTION)

    # -- choice and work ------------------------------------------------------------------------------------------------------------------

    def _choose(self, context: StepContext, assignment: Assignment | None = None) -> None:
        self._take(self.chooser.choose(self.choice, context, assignment))

    def _take(self, choice: EvaluationChoice) -> None:
        """Evaluate like this from now on; warn with the reason where batched was not asked to be given up."""
        self.choice = replace(choice, reason=None)
        if choice.reason is None or self.requested == "sequential":
            return
        warnings.warn(
            f"no batched evaluation of this model and loss: {choice.reason.rstrip('.')}. Evaluating one point after the other instead: "
            "results are right, steps are slower; forward_batching='sequential' avoids this warning.",
            stacklevel=5,
        )

    def _work(self, context: StepContext, points: int) -> Work:
        """This worker's part of a step's points."""
        if self.workers.several and self.choice.per_example is None:
            per_example = self.chooser.loss_is_per_example(context)
            self.choice = replace(self.choice, per_example=all(self.workers.exchange(per_example)))
        return split(self.workers, context, points, bool(self.choice.per_example), self.forward.sharded)


def _about_dense(dense: Coordinate, method: Method, requested: str) -> None:
    """Say what a weight in full space means for a batched evaluation, or for directions per example."""
    weight = f"{dense.name}, a weight of shape {tuple(dense.parameter.shape)} that is trained in full space"
    if method.own:
        warnings.warn(
            f"directions_per={method.directions_per!r} perturbs {weight}, once for each direction: steps are slow. One direction per step, "
            "a low-rank method (lozo, lozo-m) and an adapter (PEFT) are fast.",
            stacklevel=5,
        )
    elif requested == "batched":
        raise ValueError(
            f"forward_batching='batched' is not possible for {weight}; use one direction per step, a low-rank method (lozo, lozo-m) or an "
            "adapter (PEFT)."
        )
