"""The losses of one micro-batch at several points: in one forward of stacked rows, or in several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward import batches
from zotune.forward.batches import Owned, Stack
from zotune.forward.cuda_graphs import CudaGraphs
from zotune.forward.losses import LossFunction, evaluation, losses_of
from zotune.forward.model import PerturbedForward
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Point
from zotune.optim.state import RunState
from zotune.rng.transfer import send, send_list
from zotune.subspaces.coordinate import Offset


class BatchedForward:
    """Evaluates micro-batches at θ + sign · εZ.

    Args:
        forward: evaluates the model.
        captures: forwards that are recorded and replayed.
        state: of the run, for ε.
    """

    def __init__(self, forward: PerturbedForward, captures: CudaGraphs, state: RunState) -> None:
        self.forward, self.captures, self.state = forward, captures, state

    def stack(self, part: Any, points: Sequence[Point], seed: int, step: int) -> Stack:
        """All examples of a micro-batch at each of these points."""
        return batches.shared(points, self.state.eps, batches.batch_rows(part), seed, step)

    @tagged("activations")
    def losses(self, loss_fn: LossFunction, part: Any, stack: Stack) -> Tensor:
        """The losses of a stack, in one forward.

        Raises:
            NotBatchableError: the loss is not one number for each row.
        """
        rows = batches.take(part, stack.source, batches.batch_rows(part))
        losses = self.captures.losses(loss_fn, partial(losses_of, loss_fn), rows, stack)
        if losses is None:
            losses = self.forward.evaluate_batched(partial(losses_of, loss_fn, rows), stack)
        if losses.numel() != stack.total:
            raise NotBatchableError(f"the loss of {stack.total} stacked examples is {losses.numel()} numbers")
        return losses[send(stack.losses, losses.device)]

    @tagged("activations")
    def replayed(self, loss_fn: LossFunction, pieces: Sequence[Any], points: Sequence[Point], seed: int, step: int) -> Tensor | None:
        """The losses of these points from recordings of one point each, (P, N); None where that is not possible."""
        rows = []
        try:
            for point in points:
                losses = []
                for piece in pieces:
                    stack = self.stack(piece, [point], seed, step)
                    found = self.captures.losses(loss_fn, partial(losses_of, loss_fn), piece, stack)
                    if found is None or found.numel() != stack.total:
                        return None
                    losses.append(found)
                rows.append(torch.cat(losses))
        except NotBatchableError:
            return None
        return torch.stack(rows)

    @tagged("activations")
    def own(
        self, loss_fn: LossFunction, part: Any, owned: Owned, seed: int, step: int, signs: Sequence[float], together: bool
    ) -> tuple[Tensor, int]:
        """Losses (S, pairs) of examples under their own directions, and how many rows that took.

        Args:
            together: in one forward; else in forwards of a batch's rows at most, every sign by itself.
        """
        eps = self.state.eps
        if together:
            stack = batches.own(signs, eps, owned, seed, step)
            return self.losses(loss_fn, part, stack), stack.total
        rows, size, evaluated = [], batches.batch_rows(part), 0
        for sign in signs:
            if not sign:
                here = self.forward.evaluate(evaluation(loss_fn, [part]), Offset(0.0, seed, step, 0))
                rows.append(here[send_list(owned.examples, here.device)])
                evaluated += size
                continue
            pieces = [owned.between(start, min(start + size, len(owned))) for start in range(0, len(owned), size)]
            stacks = [batches.own((sign,), eps, piece, seed, step) for piece in pieces]
            rows.append(torch.cat([self.losses(loss_fn, part, stack)[0] for stack in stacks]))
            evaluated += sum(stack.total for stack in stacks)
        return torch.stack(rows), evaluated

    @tagged("activations")
    def alone(
        self,
        loss_fn: LossFunction,
        part: Any,
        owned: Owned,
        seed: int,
        step: int,
        signs: Sequence[float],
        only: Sequence[int] | None = None,
    ) -> Tensor:
        """Losses (S, pairs) of the examples of each direction (of ``only``), evaluated by themselves under it."""
        columns, size, eps = [], batches.batch_rows(part), self.state.eps
        for direction in sorted(set(owned.directions)) if only is None else only:
            index = torch.tensor([row for row, owner in zip(owned.examples, owned.directions, strict=True) if owner == direction])
            group = batches.take(part, index, size)
            offsets = [Offset(sign * eps, seed, step, direction) for sign in signs]
            losses = [self.forward.evaluate(evaluation(loss_fn, [group]), offset) for offset in offsets]
            columns.append(torch.stack(losses))
        return torch.cat(columns, dim=1)
