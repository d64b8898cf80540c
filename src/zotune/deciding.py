"""How a run's steps are to be evaluated, found out at the first: batched or sequential, and whether a forward's rows can be told apart.

The functions behind ``Evaluations``; they know it from inside, and leave what they find there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune import stacking
from zotune.coordinates import Offset
from zotune.io.execution import clock
from zotune.loss_values import LossFunction, as_losses, evaluation
from zotune.stacking import NotStackable, Owned

if TYPE_CHECKING:
    from zotune.evaluating import Evaluations

#: A batched evaluation of less than so many seconds is mostly calls, of which sequential ones take more.
WORTH_MEASURING = 0.5
#: Sequential has to take less than this fraction of batched's time, so that a run's choice is not a matter of chance.
CLEARLY = 0.8
REPEATS = 3


def decide(
    evaluations: Evaluations, loss_fn: LossFunction, parts: Sequence[Any] | None, seed: int, step: int, owned: Owned | None = None
) -> None:
    """Try a batched evaluation of the first micro-batch and compare some of its points with sequential ones; all workers agree."""
    if parts is None:
        evaluations.batched = False
    else:
        part, owned = evaluations.chunk(parts[0], owned)
        _try(evaluations, loss_fn, part, seed, step, owned)
    if evaluations.workers.several:
        found = evaluations.workers.exchange([bool(evaluations.batched), bool(evaluations.per_example), bool(evaluations.apart)])
        evaluations.batched, evaluations.per_example, evaluations.apart = (all(answers) for answers in zip(*found, strict=True))


def look(evaluations: Evaluations, loss_fn: LossFunction, part: Any) -> tuple[Tensor, tuple[int, ...], int | None]:
    """The losses of a micro-batch at θ, their shape, and how many examples it has, if that can be told; notes what follows."""
    try:
        rows = stacking.batch_rows(part)
    except NotStackable:
        rows = None
    shapes = []

    def noting() -> Tensor:
        loss = loss_fn(part)
        shapes.append(tuple(getattr(loss, "shape", ())))
        return as_losses([loss])

    here = evaluations.probe.evaluate(noting, Offset(0.0, 0, 0, 0))
    evaluations.per_example = shapes[0] == (rows,)
    return here, shapes[0], rows


def _try(evaluations: Evaluations, loss_fn: LossFunction, part: Any, seed: int, step: int, owned: Owned | None) -> None:
    try:
        stacking.batch_rows(part)
    except NotStackable:
        evaluations.batched = False
        return
    here, shape, rows = look(evaluations, loss_fn, part)
    if not evaluations.per_example:
        if owned is not None:
            raise ValueError(
                f"num_directions={evaluations.method.num_directions!r} needs one loss per example, and the loss function returned shape "
                f"{shape} for {rows} examples; return losses of shape (B,), or set num_directions to a number."
            )
        evaluations.batched = False
        return
    evaluations.checked = True
    if not evaluations.undecided:
        return
    if owned is None:
        points = evaluations.estimator.points(evaluations.method.directions_of(0))
        chosen = [i for i, point in enumerate(points) if point.direction in (0, points[-1].direction)]
        evaluate = evaluation(loss_fn, [part])
        offsets = [Offset(points[i].sign * evaluations.eps, seed, step, points[i].direction) for i in chosen]

        def sequentially() -> Tensor:
            return torch.stack([evaluations.probe.evaluate(evaluate, offset) for offset in offsets])

        slow = sequentially()
        _, stack = evaluations.shared(part, points, seed, step)
    else:
        ends = sorted({owned.directions[0], owned.directions[-1]})
        columns = [pair for direction in ends for pair, owner in enumerate(owned.directions) if owner == direction]

        def sequentially() -> Tensor:
            return evaluations.alone(loss_fn, part, owned, seed, step, evaluations.estimator.signs, only=ends)

        slow = sequentially()
        here = here[[owned.examples[pair] for pair in columns]]

        def at_own(together: bool) -> Tensor:
            assert owned is not None
            return evaluations.at_own(loss_fn, part, owned, seed, step, evaluations.estimator.signs, together)[0]

    together = evaluations.batched is not False
    try:
        quick = evaluations.stacked(loss_fn, part, stack)[chosen] if owned is None else at_own(together)[:, columns]
    except Exception as error:  # whatever a model or a loss does with rows it did not expect
        evaluations.give_up(str(error))
        return
    if not evaluations.probe.agree(quick, slow, here):
        evaluations.give_up(f"its losses are {quick.mean():.6g} on average, those of one point after the other {slow.mean():.6g}")
        return
    evaluations.apart = owned is not None
    if evaluations.choice == "batched" or evaluations.probe.streams:
        evaluations.batched = together
    elif owned is not None:
        evaluations.batched = together and not _sequential_is_faster(lambda: at_own(True), lambda: at_own(False), share=1.0)
    else:
        share = slow.numel() / stack.losses.numel()
        evaluations.batched = not _sequential_is_faster(lambda: evaluations.stacked(loss_fn, part, stack), sequentially, share)


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
