"""How a run's steps are evaluated, found out at the first: batched or sequential, and whether a forward's rows can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward import batches
from zotune.forward.batches import Owned
from zotune.forward.losses import LossFunction, as_losses, evaluation
from zotune.io.execution import clock
from zotune.io.memory_tags import tagged
from zotune.methods import Method
from zotune.methods.estimators import Estimator
from zotune.optim.batched_forward import BatchedForward
from zotune.optim.distributed.workers import Workers
from zotune.subspaces.coordinate import Offset

#: A batched evaluation of less than so many seconds is mostly calls, of which sequential ones take more.
WORTH_MEASURING = 0.5
#: Sequential has to take less than this fraction of batched's time, so that a run's choice is not a matter of chance.
CLEARLY = 0.8
REPEATS = 3


@dataclass(frozen=True)
class EvaluationChoice:
    """How steps are evaluated.

    Attributes:
        batched: all points in one forward; None: not found out yet.
        apart: with own directions, whether the rows of a forward can be under different ones; None: not found out yet.
        per_example: whether the loss is one number for each example; None: nobody had to know yet.
        checked: that it is, where the method needs that.
        reason: why batched evaluation was given up.
    """

    batched: bool | None
    apart: bool | None
    per_example: bool | None = None
    checked: bool = False
    reason: str | None = None

    @property
    def undecided(self) -> bool:
        """Whether the next step has to find out how it can be evaluated."""
        return self.batched is None or self.apart is None

    def give_up(self, reason: str) -> EvaluationChoice:
        """One point after the other from now on."""
        return replace(self, batched=False, apart=False, reason=reason)


def chunk(workers: Workers, part: Any, owned: Owned | None = None) -> tuple[Any, Owned | None]:
    """The examples of a micro-batch that this worker tries things out on, and the directions that they have of their own."""
    try:
        rows = batches.batch_rows(part)
    except NotBatchableError:
        return part, owned
    chunk = workers.chunk(rows)
    if len(chunk) == rows:
        return part, owned
    if owned is not None:
        pairs = [(e - chunk.start, d) for e, d in zip(owned.examples, owned.directions, strict=True) if e in chunk]
        owned = Owned(tuple(e for e, _ in pairs), tuple(d for _, d in pairs))
    return batches.take(part, torch.arange(chunk.start, chunk.stop), rows), owned


class Chooser:
    """Tries a batched evaluation of a micro-batch and compares some of its points with sequential ones.

    Args:
        batched_forward: evaluates micro-batches.
        method, estimator: what a step evaluates.
        workers: all choose alike.
        asked: ``"auto"``, ``"batched"`` or ``"sequential"``.
    """

    def __init__(self, batched_forward: BatchedForward, method: Method, estimator: Estimator, workers: Workers, asked: str) -> None:
        self.batched_forward, self.method, self.estimator, self.workers, self.asked = batched_forward, method, estimator, workers, asked

    @tagged("activations")
    def choose(
        self, before: EvaluationChoice, loss_fn: LossFunction, parts: list[Any] | None, seed: int, step: int, owned: Owned | None = None
    ) -> EvaluationChoice:
        """What all workers can do; ``before`` is what is known.

        Raises:
            ValueError: the method needs one loss per example, and there is not.
        """
        if parts is None:
            found = replace(before, batched=False)
        else:
            part, owned = chunk(self.workers, parts[0], owned)
            found = self._try(before, loss_fn, part, seed, step, owned)
        if self.workers.several:
            everybody = self.workers.exchange([bool(found.batched), bool(found.per_example), bool(found.apart)])
            batched, per_example, apart = (all(answers) for answers in zip(*everybody, strict=True))
            found = replace(found, batched=batched, per_example=per_example, apart=apart)
        return found

    def sample(self, loss_fn: LossFunction, part: Any) -> tuple[Tensor, tuple[int, ...], int | None]:
        """The losses of a micro-batch at θ, their shape, and how many examples it has, if that can be told."""
        try:
            rows = batches.batch_rows(part)
        except NotBatchableError:
            rows = None
        shapes = []

        def noting() -> Tensor:
            loss = loss_fn(part)
            shapes.append(tuple(getattr(loss, "shape", ())))
            return as_losses([loss])

        here = self.batched_forward.forward.evaluate(noting, Offset(0.0, 0, 0, 0))
        return here, shapes[0], rows

    def _try(
        self, before: EvaluationChoice, loss_fn: LossFunction, part: Any, seed: int, step: int, owned: Owned | None
    ) -> EvaluationChoice:
        try:
            batches.batch_rows(part)
        except NotBatchableError:
            return replace(before, batched=False)
        here, shape, rows = self.sample(loss_fn, part)
        if shape != (rows,):
            if owned is not None:
                raise ValueError(
                    f"directions_per={self.method.directions_per!r} needs one loss per example, and the loss function returned shape "
                    f"{shape} for {rows} examples; return losses of shape (B,), or set directions_per to 'batch'."
                )
            return replace(before, per_example=False, batched=False)
        known = replace(before, per_example=True, checked=True)
        if not known.undecided:
            return known
        if owned is None:
            return self._compare_points(known, loss_fn, part, seed, step, here)
        return self._compare_own(known, loss_fn, part, seed, step, owned, here)

    def _compare_points(
        self, known: EvaluationChoice, loss_fn: LossFunction, part: Any, seed: int, step: int, here: Tensor
    ) -> EvaluationChoice:
        batched, eps = self.batched_forward, self.batched_forward.state.eps
        points = self.estimator.points(self.method.directions_of(0))
        chosen = [i for i, point in enumerate(points) if point.direction in (0, points[-1].direction)]
        evaluate = evaluation(loss_fn, [part])
        offsets = [Offset(points[i].sign * eps, seed, step, points[i].direction) for i in chosen]

        def sequentially() -> Tensor:
            return torch.stack([batched.forward.evaluate(evaluate, offset) for offset in offsets])

        slow = sequentially()
        stack = batched.stack(part, points, seed, step)
        reason = self._difference(lambda: batched.losses(loss_fn, part, stack)[chosen], slow, here)
        if reason is not None:
            return known.give_up(reason)
        known = replace(known, apart=False)
        if self._need_not_time:
            return replace(known, batched=known.batched is not False)
        share = slow.numel() / stack.losses.numel()
        slower = _sequential_is_faster(lambda: batched.losses(loss_fn, part, stack), sequentially, share)
        return replace(known, batched=not slower)

    def _compare_own(
        self, known: EvaluationChoice, loss_fn: LossFunction, part: Any, seed: int, step: int, owned: Owned, here: Tensor
    ) -> EvaluationChoice:
        batched, signs = self.batched_forward, self.estimator.signs
        ends = sorted({owned.directions[0], owned.directions[-1]})
        columns = [pair for direction in ends for pair, owner in enumerate(owned.directions) if owner == direction]
        slow = batched.alone(loss_fn, part, owned, seed, step, signs, only=ends)
        here = here[[owned.examples[pair] for pair in columns]]

        def at_own(together: bool) -> Tensor:
            return batched.own(loss_fn, part, owned, seed, step, signs, together)[0]

        together = known.batched is not False
        reason = self._difference(lambda: at_own(together)[:, columns], slow, here)
        if reason is not None:
            return known.give_up(reason)
        known = replace(known, apart=True)
        if self._need_not_time:
            return replace(known, batched=together)
        return replace(known, batched=together and not _sequential_is_faster(lambda: at_own(True), lambda: at_own(False), share=1.0))

    @property
    def _need_not_time(self) -> bool:
        return self.asked == "batched" or self.batched_forward.forward.streams

    def _difference(self, batched: Callable[[], Tensor], slow: Tensor, here: Tensor) -> str | None:
        """Why batched losses cannot be taken for the sequential ones; None: they can."""
        try:
            quick = batched()
        except Exception as error:  # whatever a model or a loss does with rows it did not expect
            return str(error)
        if self.batched_forward.forward.agree(quick, slow, here):
            return None
        return f"its losses are {quick.mean():.6g} on average, those of one point after the other {slow.mean():.6g}"


def _sequential_is_faster(batched: Callable[[], Tensor], sequential: Callable[[], Tensor], share: float) -> bool:
    """Whether evaluating one point after the other takes clearly less time; ``sequential`` does ``share`` of them."""
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for work, kept in zip((batched, sequential), times, strict=True):
            start = clock()
            work().cpu()  # waits for the device
            kept.append(clock() - start)
        if times[0][0] < WORTH_MEASURING:
            return False
    return min(times[1]) / share < CLEARLY * min(times[0])
