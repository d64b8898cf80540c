"""The choice at a run's first step: batched or sequential, and whether the rows of a forward can be under different directions.

Some points are evaluated both ways. Batched is given up, with a warning, where losses disagree. ``"auto"`` then times both and takes
sequential only where it is clearly faster (a batch whose stacked activations leave the caches). With offloaded weights nothing is timed:
batched loads them once, sequential once a point. Losses that generate texts jump where a token changes; the comparison takes a smooth loss
in their place (``proxy``), and batched, which reads every weight once a token for all points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward.batches import Assignment, batch_rows, take_rows
from zotune.forward.losses import LossFunction, as_losses, evaluation
from zotune.io.execution import clock
from zotune.io.memory_tags import tagged
from zotune.methods import Method
from zotune.methods.estimators import Estimator, Point
from zotune.optim.batched_forward import BatchedForward
from zotune.optim.distributed.workers import Workers
from zotune.optim.state import StepContext
from zotune.subspaces.coordinate import Offset

#: A batched evaluation of fewer seconds is mostly calls, and sequential ones take more of them.
WORTH_MEASURING = 0.5
#: Sequential has to take less than this fraction of batched's time, so that a run's choice is not a matter of chance.
CLEARLY = 0.8
REPEATS = 3
#: Multiples of ε at which evaluations are compared.
FARTHER = (1, 10, 100, 1000)


@dataclass(frozen=True)
class EvaluationChoice:
    """How steps are evaluated.

    Attributes:
        batched: all points in one forward; None: not known yet.
        rowwise: with directions per example, whether the rows of a forward can be under different ones; None: not known yet.
        per_example: whether the loss is one number per example; None: not needed yet.
        checked: whether that was checked, where the method needs it.
        reason: why batched was given up.
    """

    batched: bool | None
    rowwise: bool | None
    per_example: bool | None = None
    checked: bool = False
    reason: str | None = None

    @property
    def undecided(self) -> bool:
        """Whether the next step has to make the choice."""
        return self.batched is None or self.rowwise is None

    def give_up(self, reason: str) -> EvaluationChoice:
        """One point after the other from now on."""
        return replace(self, batched=False, rowwise=False, reason=reason)


def worker_chunk(workers: Workers, part: Any, assignment: Assignment | None = None) -> tuple[Any, Assignment | None]:
    """The examples of a micro-batch that this worker compares evaluations on, and their own directions."""
    try:
        rows = batch_rows(part)
    except NotBatchableError:
        return part, assignment
    chunk = workers.chunk(rows)
    if len(chunk) == rows:
        return part, assignment
    if assignment is not None:
        pairs = [(e - chunk.start, d) for e, d in zip(assignment.examples, assignment.directions, strict=True) if e in chunk]
        assignment = Assignment(tuple(e for e, _ in pairs), tuple(d for _, d in pairs))
    return take_rows(part, torch.arange(chunk.start, chunk.stop), rows), assignment


class Chooser:
    """Compares a batched evaluation of a micro-batch with sequential ones of some of its points.

    Args:
        batched: evaluates micro-batches.
        method, estimator: what a step evaluates.
        workers: all make the same choice.
        requested: ``"auto"``, ``"batched"`` or ``"sequential"``.
    """

    def __init__(self, batched: BatchedForward, method: Method, estimator: Estimator, workers: Workers, requested: str) -> None:
        self.batched, self.method, self.estimator, self.workers, self.requested = batched, method, estimator, workers, requested

    @tagged("activations")
    def choose(self, before: EvaluationChoice, context: StepContext, assignment: Assignment | None = None) -> EvaluationChoice:
        """What all workers can do; ``before``: what is known.

        Raises:
            ValueError: the method needs one loss per example, and gets another shape.
        """
        times = not (self.requested == "batched" or context.generates or self.batched.forward.streams)
        context = context.smooth
        if context.parts is None:
            found = replace(before, batched=False)
        else:
            part, assignment = worker_chunk(self.workers, context.parts[0], assignment)
            found = self._compare(before, context, part, assignment, times)
        if self.workers.several:
            answers = self.workers.exchange([bool(found.batched), bool(found.per_example), bool(found.rowwise)])
            batched, per_example, rowwise = (all(column) for column in zip(*answers, strict=True))
            found = replace(found, batched=batched, per_example=per_example, rowwise=rowwise)
        return found

    def loss_is_per_example(self, context: StepContext) -> bool:
        """Whether the loss of this worker's chunk is one number per example."""
        if context.parts is None:
            return False
        _, shape, rows = self._at_theta(context.smooth.loss_fn, worker_chunk(self.workers, context.parts[0])[0])
        return shape == (rows,)

    def _at_theta(self, loss_fn: LossFunction, part: Any) -> tuple[Tensor, tuple[int, ...], int | None]:
        """The losses of a micro-batch at θ, their shape, and its number of examples, None if they cannot be told apart."""
        try:
            rows = batch_rows(part)
        except NotBatchableError:
            rows = None
        shapes = []

        def losses() -> Tensor:
            loss = loss_fn(part)
            shapes.append(tuple(getattr(loss, "shape", ())))
            return as_losses([loss])

        here = self.batched.forward.evaluate(losses, Offset(0.0, 0, 0, 0))
        return here, shapes[0], rows

    def _compare(
        self, before: EvaluationChoice, context: StepContext, part: Any, assignment: Assignment | None, times: bool
    ) -> EvaluationChoice:
        try:
            batch_rows(part)
        except NotBatchableError:
            return replace(before, batched=False)
        here, shape, rows = self._at_theta(context.loss_fn, part)
        if shape != (rows,):
            if assignment is not None:
                raise ValueError(
                    f"directions_per={self.method.directions_per!r} needs one loss per example, and the loss function returned shape "
                    f"{shape} for {rows} examples; return losses of shape (B,), or set directions_per to 'batch'."
                )
            return replace(before, per_example=False, batched=False)
        known = replace(before, per_example=True, checked=True)
        if not known.undecided:
            return known
        if assignment is None:
            return self._compare_shared(known, context, part, here, times)
        return self._compare_assigned(known, context, part, assignment, here, times)

    def _compare_shared(self, known: EvaluationChoice, context: StepContext, part: Any, here: Tensor, times: bool) -> EvaluationChoice:
        batched, eps, loss_fn = self.batched, self.batched.state.eps, context.loss_fn
        points = self.estimator.points(self.method.directions_of(0))
        chosen = [i for i, point in enumerate(points) if point.direction in (0, points[-1].direction)]
        evaluate = evaluation(loss_fn, [part])

        def sequentially(farther: int = 1) -> Tensor:
            signs = [(points[i].sign * farther, points[i].direction) for i in chosen]
            offsets = [Offset(sign * eps, context.seed, context.step, direction) for sign, direction in signs]
            return torch.stack([batched.forward.evaluate(evaluate, offset) for offset in offsets])

        slow, farther = _with_effect(sequentially, here)
        far = batched.layout(context, part, [Point(point.sign * farther, point.direction) for point in points])
        reason = self._difference(lambda: batched.losses(loss_fn, part, far)[chosen], slow, here)
        if reason is not None:
            return known.give_up(reason)
        known = replace(known, rowwise=False)
        if not times:
            return replace(known, batched=known.batched is not False)
        layout = batched.layout(context, part, points)
        share = slow.numel() / layout.losses.numel()
        slower = _sequential_is_faster(lambda: batched.losses(loss_fn, part, layout), sequentially, share)
        return replace(known, batched=not slower)

    def _compare_assigned(
        self, known: EvaluationChoice, context: StepContext, part: Any, assignment: Assignment, here: Tensor, times: bool
    ) -> EvaluationChoice:
        batched, signs = self.batched, self.estimator.signs
        ends = sorted({assignment.directions[0], assignment.directions[-1]})
        columns = [pair for direction in ends for pair, owner in enumerate(assignment.directions) if owner == direction]
        here = here[[assignment.examples[pair] for pair in columns]]

        def alone(farther: int) -> Tensor:
            return batched.by_direction(context, part, assignment, [sign * farther for sign in signs], only=ends)

        def rowwise(together: bool, farther: int = 1) -> Tensor:
            return batched.rowwise(context, part, assignment, [sign * farther for sign in signs], together)[0]

        together, (slow, farther) = known.batched is not False, _with_effect(alone, here)
        reason = self._difference(lambda: rowwise(together, farther)[:, columns], slow, here)
        if reason is not None:
            return known.give_up(reason)
        known = replace(known, rowwise=True)
        if not times:
            return replace(known, batched=together)
        return replace(known, batched=together and not _sequential_is_faster(lambda: rowwise(True), lambda: rowwise(False), share=1.0))

    def _difference(self, batched: Callable[[], Tensor], slow: Tensor, here: Tensor) -> str | None:
        """Why batched losses do not stand for the sequential ones; None: they do."""
        try:
            quick = batched()
        except Exception as error:  # whatever a model or a loss does with rows it did not expect
            return str(error)
        if self.batched.forward.agree(quick, slow, here):
            return None
        return (
            f"its losses are {quick.mean():.6g} on average, those of one point after the other {slow.mean():.6g}, as where a row's loss "
            "depends on the rows beside it (random numbers drawn for all rows, padding behind generated texts)"
        )


def _with_effect(losses: Callable[[int], Tensor], here: Tensor) -> tuple[Tensor, int]:
    """The perturbed losses, of the smallest of some multiples of ε at which one differs from ``here``, and that multiple.

    Losses of generated texts may be the same at θ ± ε, whichever weights they were computed with.
    """
    for farther in FARTHER:
        found = losses(farther)
        if bool((found != here).any()):
            break
    return found, farther


def _sequential_is_faster(batched: Callable[[], Tensor], sequential: Callable[[], Tensor], share: float) -> bool:
    """Whether sequential takes clearly less time; ``sequential`` evaluates ``share`` of the points."""
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for work, kept in zip((batched, sequential), times, strict=True):
            start = clock()
            work().cpu()  # waits for the device
            kept.append(clock() - start)
        if times[0][0] < WORTH_MEASURING:
            return False
    return min(times[1]) / share < CLEARLY * min(times[0])
