"""The losses of one micro-batch at several points: in one forward of stacked rows, or in several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward.batches import Assignment, BatchLayout, assigned_layout, batch_rows, shared_layout, take_rows
from zotune.forward.cuda_graphs import CudaGraphs
from zotune.forward.losses import LossFunction, evaluation, losses_of
from zotune.forward.model import PerturbedForward
from zotune.forward.row_check import rows_checked
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Point
from zotune.optim.state import RunState, StepContext
from zotune.rng.transfer import send, send_list
from zotune.subspaces.coordinate import Offset


def rows_at_once(loss_fn: LossFunction, part: Any) -> int | None:
    """Rows that a loss evaluates at once, at most, where it says so."""
    limit = getattr(loss_fn, "rows_at_once", None)
    return None if limit is None else limit(part)


class BatchedForward:
    """Evaluates micro-batches at θ + sign · εZ.

    Args:
        forward: evaluates the model.
        graphs: forwards that are captured and launched again.
        state: of the run, for ε.
    """

    def __init__(self, forward: PerturbedForward, graphs: CudaGraphs, state: RunState) -> None:
        self.forward, self.graphs, self.state = forward, graphs, state

    def layout(self, context: StepContext, part: Any, points: Sequence[Point]) -> BatchLayout:
        """All examples of a micro-batch at each of these points."""
        return shared_layout(points, self.state.eps, batch_rows(part), context.seed, context.step)

    @tagged("activations")
    def at_points(self, context: StepContext, part: Any, points: Sequence[Point]) -> Tensor:
        """The losses of a micro-batch at points, points × examples: in one forward, or in as many as the loss's memory needs."""
        most, rows = rows_at_once(context.loss_fn, part), batch_rows(part)
        if most is not None and most < rows:
            pieces = [take_rows(part, torch.arange(start, min(start + most, rows)), rows) for start in range(0, rows, most)]
            return torch.cat([self.at_points(context, piece, points) for piece in pieces], dim=1)
        each = len(points) if most is None else most // rows
        runs = [points[start : start + each] for start in range(0, len(points), each)]
        return torch.cat([self.losses(context.loss_fn, part, self.layout(context, part, run)) for run in runs])

    @tagged("activations")
    def losses(self, loss_fn: LossFunction, part: Any, layout: BatchLayout) -> Tensor:
        """The losses of a layout, points × examples, in one forward.

        Raises:
            NotBatchableError: the loss is not one number per row, or does not call the model with the rows.
        """
        rows = take_rows(part, layout.source, batch_rows(part))
        with rows_checked(self.forward.model, layout.total):
            losses = self.graphs.losses(loss_fn, partial(losses_of, loss_fn), rows, layout)
            if losses is None:
                losses = self.forward.evaluate_batched(partial(losses_of, loss_fn, rows), layout)
        if losses.numel() != layout.total:
            raise NotBatchableError(f"the loss of {layout.total} stacked examples is {losses.numel()} numbers")
        return losses[send(layout.losses, losses.device)]

    @tagged("activations")
    def one_by_one_from_graphs(self, context: StepContext, pieces: Sequence[Any], points: Sequence[Point]) -> Tensor | None:
        """The losses (P, N) of these points, each from a captured forward of its own; None where that is not possible."""
        rows, loss_fn = [], context.loss_fn
        try:
            for point in points:
                losses = []
                for piece in pieces:
                    layout = self.layout(context, piece, [point])
                    found = self.graphs.losses(loss_fn, partial(losses_of, loss_fn), piece, layout)
                    if found is None or found.numel() != layout.total:
                        return None
                    losses.append(found)
                rows.append(torch.cat(losses))
        except NotBatchableError:
            return None
        return torch.stack(rows)

    @tagged("activations")
    def rowwise(
        self, context: StepContext, part: Any, assignment: Assignment, signs: Sequence[float], together: bool
    ) -> tuple[Tensor, int]:
        """Losses (S, pairs) of pairs (example, direction), and the number of rows evaluated.

        Args:
            together: in one forward; else in forwards of at most a batch's rows, every sign by itself.
        """
        eps, seed, step, loss_fn = self.state.eps, context.seed, context.step, context.loss_fn
        most = rows_at_once(loss_fn, part)
        if together and (most is None or len(signs) * len(assignment) <= most):
            layout = assigned_layout(signs, eps, assignment, seed, step)
            return self.losses(loss_fn, part, layout), layout.total
        rows, size, evaluated = [], batch_rows(part), 0
        width = size if most is None else min(size, most)
        for sign in signs:
            if not sign:
                here = self.forward.evaluate(evaluation(loss_fn, [part]), Offset(0.0, seed, step, 0))
                rows.append(here[send_list(assignment.examples, here.device)])
                evaluated += size
                continue
            pieces = [assignment.slice(start, min(start + width, len(assignment))) for start in range(0, len(assignment), width)]
            layouts = [assigned_layout((sign,), eps, piece, seed, step) for piece in pieces]
            rows.append(torch.cat([self.losses(loss_fn, part, layout)[0] for layout in layouts]))
            evaluated += sum(layout.total for layout in layouts)
        return torch.stack(rows), evaluated

    @tagged("activations")
    def by_direction(
        self, context: StepContext, part: Any, assignment: Assignment, signs: Sequence[float], only: Sequence[int] | None = None
    ) -> Tensor:
        """Losses (S, pairs): the examples of each direction (of ``only``) in a forward of their own."""
        columns, size, eps = [], batch_rows(part), self.state.eps
        at_theta: dict[tuple[int, ...], Tensor] = {}  # the same for all directions of some examples
        for direction in sorted(set(assignment.directions)) if only is None else only:
            examples = tuple(row for row, owner in zip(assignment.examples, assignment.directions, strict=True) if owner == direction)
            evaluate = evaluation(context.loss_fn, [take_rows(part, torch.tensor(examples), size)])
            losses = []
            for sign in signs:
                if sign or examples not in at_theta:
                    found = self.forward.evaluate(evaluate, Offset(sign * eps, context.seed, context.step, direction))
                    if not sign:
                        at_theta[examples] = found
                losses.append(found if sign else at_theta[examples])
            columns.append(torch.stack(losses))
        return torch.cat(columns, dim=1)
