"""Who evaluates what of a step: a worker's :class:`Work`, or its :class:`AssignedWork` where examples have directions of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.forward.batches import Assignment, assign_directions, batch_rows, take_rows
from zotune.forward.losses import LossFunction, evaluation
from zotune.optim.distributed.workers import Share, Workers
from zotune.optim.state import StepContext


@dataclass(frozen=True)
class Work:
    """What this worker evaluates of a step.

    Attributes:
        workers: who take the step together.
        share: this worker's points and columns, and everybody's.
        loss_fn: loss of one piece, or of the closure.
        pieces: this worker's micro-batches or parts of them; None for a closure.
    """

    workers: Workers
    share: Share
    loss_fn: LossFunction
    pieces: list[Any] | None

    @property
    def calls(self) -> list[Callable[[], Any]]:
        """The loss of each piece; empty where this worker has nothing to evaluate."""
        if not self.share.pieces:
            return []
        return [self.loss_fn] if self.pieces is None else [partial(self.loss_fn, piece) for piece in self.pieces]

    @property
    def losses(self) -> Callable[[], Tensor]:
        """A function without arguments that evaluates the losses of all pieces, float32, (n,)."""
        return evaluation(self.loss_fn, self.pieces)

    def gather(self, values: Tensor | None, each: int = 1) -> tuple[Tensor, int]:
        """Everybody's table of losses, and the sequences evaluated for it; see :meth:`Workers.gather`."""
        return self.workers.gather(self.share, values, 0 if values is None else values.numel(), each)


def split(workers: Workers, context: StepContext, points: int, per_example: bool, sharded: bool) -> Work:
    """This worker's part of ``points`` points on a step's micro-batches.

    Args:
        per_example: whether the loss is one number per example, so that a batch can be split.
        sharded: whether weights are sharded, so that all workers have to evaluate the same points.

    Raises:
        ValueError: sharded weights, and the step's work cannot be split by examples.
    """
    parts, loss_fn = context.parts, context.loss_fn
    if not workers.several:
        whole = tuple((part, 0, 1) for part in range(1 if parts is None else len(parts)))
        return Work(workers, Share(range(points), whole, (), (points, 0)), loss_fn, None if parts is None else list(parts))
    widths = [1] if parts is None else [batch_rows(part) if per_example else 1 for part in parts]
    share = workers.share(points, widths)
    if sharded:
        together = all(len(block.points) == points and len(block.columns) for block in share.blocks)
        if not together or parts is None or len(parts) > 1:
            raise ValueError(
                "of sharded weights all processes evaluate the same points together: give step() one batch, of at least an example for "
                "each process, a loss function with one loss per example, and parallelism='data'."
            )
    pieces = None if parts is None else [_rows(parts[part], start, stop, widths[part]) for part, start, stop in share.pieces]
    return Work(workers, share, loss_fn if per_example else partial(_mean_loss, loss_fn), pieces)


def _rows(part: Any, start: int, stop: int, width: int) -> Any:
    return part if (start, stop) == (0, width) else take_rows(part, torch.arange(start, stop), width)


def _mean_loss(loss_fn: LossFunction, *batch: Any) -> Any:
    loss = loss_fn(*batch)
    return loss.mean() if isinstance(loss, Tensor) and loss.dim() == 1 else loss


@dataclass(frozen=True)
class AssignedWork:
    """What this worker evaluates of a step whose groups or examples have directions of their own.

    Attributes:
        share: this worker's columns, and everybody's.
        assignments: pairs (example, direction) of every micro-batch of all workers.
        first: the pairs of this worker's first micro-batch.
        pieces: micro-batches, and the pairs of them that this worker evaluates.
        num_directions: K.
    """

    share: Share
    assignments: list[Assignment]
    first: Assignment
    pieces: list[tuple[Any, Assignment]]
    num_directions: int

    @property
    def owners(self) -> Tensor:
        """The direction of each column of the table of losses."""
        return torch.tensor([direction for one in self.assignments for direction in one.directions])


def split_assigned(workers: Workers, parts: Sequence[Any], groups_of: Callable[[int], int], each: int) -> AssignedWork:
    """This worker's part of a step in which every group has ``each`` directions; ``groups_of``: groups of so many examples.

    Raises:
        NotBatchableError: a micro-batch has no examples that can be told apart.
    """
    sizes, first = workers.sizes([batch_rows(part) for part in parts])
    groups = groups_of(sum(sizes))
    everybody = assign_directions(sizes, groups, each)
    mine = everybody[first : first + len(parts)]
    share = workers.share(1, [len(one) for one in mine], _group_edges(mine, each) if workers.several else None)
    pieces = [(parts[part], mine[part].slice(start, stop)) for part, start, stop in share.pieces]
    return AssignedWork(share, everybody, mine[0], pieces, groups * each)


def _group_edges(assignments: Sequence[Assignment], each: int) -> list[int]:
    """Columns at which one group ends and the next begins, over all micro-batches."""
    edges, at = [0], 0
    for one in assignments:
        changes = [place for place in range(1, len(one)) if one.directions[place] // each != one.directions[place - 1] // each]
        edges += [at + place for place in changes] + [at + len(one)]
        at += len(one)
    return edges
