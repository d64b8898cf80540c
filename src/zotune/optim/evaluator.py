"""The losses of a step: all points in one forward of stacked rows (*batched*), or one point after the other (*sequential*).

Both give the same losses up to rounding. Batched reads every weight once for all points and pays the overhead of a forward once;
sequential needs the activations of one batch only. Where examples have directions of their own, a point is one forward of the batch all the
same, each row under its own direction; a model whose rows can't be told apart has its examples evaluated by themselves. Batched is possible
where the batch's examples can be told apart, the loss is one number an example, and every parameter that moves is low-rank, a vector, or a
thin matrix (an adapter's). A full matrix would need copies of itself, one a direction.

The first step evaluates some points both ways and gives batched up, with a warning, where they disagree. ``"auto"`` then times the two and
takes sequential only where it is clearly faster (a batch whose stacked activations leave the caches can be). Where weights come and go
(``offloading``) nothing is timed: they come once for a batched evaluation, and once a point for a sequential one. The choice is made once
a run, for losses differ in their last bits: a checkpoint holds it, and the journal has an event where it is sequential.

Several workers (``distributed``) evaluate a share of a step each; what leaves here is everybody's table of losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward import batches
from zotune.forward.batches import SHARED, Owned
from zotune.forward.cuda_graphs import CudaGraphs
from zotune.forward.losses import Losses, LossFunction, as_losses, evaluation
from zotune.forward.model import PerturbedForward
from zotune.io.memory_tags import tagged
from zotune.methods import Method
from zotune.methods.estimators import Estimator
from zotune.optim.batched_forward import BatchedForward
from zotune.optim.context import StepContext
from zotune.optim.distributed.workers import Share, Workers
from zotune.optim.evaluation_choice import Chooser, EvaluationChoice, chunk
from zotune.optim.state import RunState
from zotune.subspaces.coordinate import Offset

PROBES = ("auto", "batched", "sequential")


class Evaluator:
    """Evaluates the losses of steps.

    Args:
        forward: evaluates the model.
        method: says which points.
        estimator: the method's.
        choice: ``"auto"``, ``"batched"`` or ``"sequential"``.
        state: of the run, for ε.
        workers: who evaluates with us; None: nobody.
        cuda_graphs: what is recorded and replayed (see ``captured``).

    Raises:
        ValueError: another choice; ``"batched"``, or a method with own directions, where a parameter cannot be evaluated at several points
            at once.
    """

    def __init__(
        self,
        forward: PerturbedForward,
        method: Method,
        estimator: Estimator,
        choice: str,
        state: RunState,
        workers: Workers | None = None,
        cuda_graphs: bool | str = "auto",
    ) -> None:
        if choice not in PROBES:
            raise ValueError(f"unknown forward_batching {choice!r}; choose one of {', '.join(PROBES)}.")
        dense = forward.dense
        together = dense is None or (choice == "batched" and not method.own and method.num_directions == 1 and forward.batches_dense)
        if not together and (method.own or choice == "batched"):
            assert dense is not None
            what = f"directions_per={method.directions_per!r}" if method.own else "forward_batching='batched'"
            raise ValueError(
                f"{what} is not possible for {dense.name}, a weight of shape {tuple(dense.parameter.shape)} that moves in full space; "
                "use one direction a step, a low-rank method (lozo, lozo-m) or an adapter (PEFT)."
            )
        self.forward, self.method, self.estimator, self.choice, self.state = forward, method, estimator, choice, state
        self.workers = workers or Workers()
        self.captures = CudaGraphs(forward, cuda_graphs)
        self.batched_forward = BatchedForward(forward, self.captures, state)
        self.chooser = Chooser(self.batched_forward, method, estimator, self.workers, choice)
        self.found = EvaluationChoice(
            batched=None if choice != "sequential" and together and not forward.sharded else False,
            apart=None if method.own and not forward.sharded else False,
        )

    @property
    def batched(self) -> bool | None:
        """Whether all points are evaluated in one forward; None until the first step has found out."""
        return self.found.batched

    @property
    def apart(self) -> bool | None:
        """Whether the rows of a forward can be under different directions; None until the first step has found out."""
        return self.found.apart

    @property
    def undecided(self) -> bool:
        """Whether the next step has to find out how it can be evaluated."""
        return self.found.undecided

    def restore(self, batched: bool | None, apart: bool | None) -> None:
        """Go on as the run did so far, where this one was not asked to do otherwise."""
        if self.forward.sharded:
            return
        if self.choice != "sequential" and (self.forward.dense is None or self.choice == "batched"):
            self.found = replace(self.found, batched=batched)
        if self.method.own:
            self.found = replace(self.found, apart=apart)

    def event(self) -> dict[str, Any]:
        """How the run is evaluated, for its journal, where that is not batched."""
        return {"event": "forward_batching", "batched": bool(self.batched), **({"apart": bool(self.apart)} if self.method.own else {})}

    # -- a step ---------------------------------------------------------------------------------------------------------------------

    def evaluate(self, context: StepContext) -> Losses:
        """The losses of a step. A run that goes on sequentially though it might have been batched says so in the journal.

        Raises:
            ValueError: the loss has no shape that the method can use.
        """
        known = self.batched, self.apart
        losses = self._evaluate(context)
        if any(now is False and before is not False for now, before in zip((self.batched, self.apart), known, strict=True)):
            self.state.write(self.event())
        return losses

    @tagged("activations")
    def _evaluate(self, context: StepContext) -> Losses:
        if self.method.own:
            return self._own(context, self.estimator.signs, self.method.num_directions)
        if self.method.estimator == "tangent":
            return self._tangents(context)
        loss_fn, parts, seed, step = context.loss_fn, context.parts, context.seed, context.step
        points, eps = self.estimator.points(self.method.directions_of(0)), self.state.eps
        if self.batched is None:
            self._choose(context)
        share = self._share(loss_fn, parts, len(points))
        mine = [points[place] for place in share.points]
        values = None
        if share.pieces and self.batched and parts is not None:
            try:
                stacks = [(piece, self.batched_forward.stack(piece, mine, seed, step)) for piece in self._pieces(parts, share) or ()]
                values = torch.cat([self.batched_forward.losses(loss_fn, piece, stack) for piece, stack in stacks], dim=1)
            except NotBatchableError as error:
                self._give_up(str(error))
        if share.pieces and values is None and parts is not None and self.captures.on:
            values = self.batched_forward.replayed(loss_fn, self._pieces(parts, share) or (), mine, seed, step)
        if share.pieces and values is None:
            evaluate = evaluation(self._reduced(loss_fn), self._pieces(parts, share))
            rows = [self.forward.evaluate(evaluate, Offset(point.sign * eps, seed, step, point.direction)) for point in mine]
            values = torch.stack(rows)
        values, evaluated = self._gathered(share, values)
        return Losses(values, None, self.method.directions_of(0), evaluated)

    def function(self, context: StepContext) -> Callable[[], Tensor]:
        """A function without arguments that gives the losses of the step's examples, everybody's, float32, (N,)."""
        if not self.workers.several:
            return evaluation(context.loss_fn, context.parts)
        share = self._share(context.loss_fn, context.parts, 1)
        evaluate = evaluation(self._reduced(context.loss_fn), self._pieces(context.parts, share)) if share.pieces else None

        def losses() -> Tensor:
            values = None if evaluate is None else evaluate().unsqueeze(0)
            return self._gathered(share, values)[0][0]

        return losses

    @tagged("activations")
    def table(self, context: StepContext, each: int, rows_of: Callable[[Callable[[], Tensor]], Tensor]) -> tuple[Tensor, int]:
        """Everybody's table (each, N) of what ``rows_of`` makes of every micro-batch's losses, and the sequences evaluated for it.

        Args:
            rows_of: (each, n) of a function that evaluates the losses of n examples, float32, (n,).
        """
        share = self._share(context.loss_fn, context.parts, 1)
        pieces = self._pieces(context.parts, share) if share.pieces else []
        loss_fn = self._reduced(context.loss_fn)
        found = [rows_of(evaluation(loss_fn, part)) for part in ([None] if pieces is None else [[piece] for piece in pieces])]
        values, evaluated = self._gathered(share, torch.cat(found, dim=1) if found else None, each)
        return values, evaluated // each

    def trial(self, context: StepContext) -> Callable[[], Tensor]:
        """A function without arguments that gives losses for us to compare evaluations by; no worker waits for another in it."""
        parts = context.parts
        return evaluation(context.loss_fn, None if parts is None else [chunk(self.workers, part)[0] for part in parts])

    def around(self, context: StepContext, scale: float = 1) -> Losses:
        """The losses at θ and θ ± scale · εZ, (3, N), one direction Z to every :data:`SHARED` neighboring parts of the examples."""
        return self._own(context, (0, +scale, -scale), 1, shared=SHARED)

    @tagged("activations")
    def _tangents(self, context: StepContext) -> Losses:
        """Losses and their derivatives along every direction, 2K rows."""
        share = self._share(context.loss_fn, context.parts, self.method.directions_of(0))
        pieces = self._pieces(context.parts, share) if share.pieces else []
        loss_fn = self._reduced(context.loss_fn)
        calls = [loss_fn] if pieces is None else [partial(loss_fn, piece) for piece in pieces]
        rows: list[Tensor] = []
        for direction in share.points if calls else ():
            found = [self.forward.tangent(call, Offset(0.0, context.seed, context.step, direction)) for call in calls]
            rows += [as_losses([loss for loss, _ in found]), as_losses([tangent for _, tangent in found])]
        values, evaluated = self._gathered(share, torch.stack(rows) if rows else None, each=2)
        return Losses(values, None, self.method.directions_of(0), evaluated // 2)

    @tagged("activations")
    def _own(self, context: StepContext, signs: Sequence[float], each: int, shared: int = 1) -> Losses:
        """Losses of parts of the examples, or of every example, under directions of their own."""
        loss_fn, parts, seed, step = context.loss_fn, context.parts, context.seed, context.step
        try:
            if parts is None:
                raise NotBatchableError("a closure has no batch")
            sizes = [batches.batch_rows(part) for part in parts]
        except NotBatchableError as error:
            raise ValueError(
                f"directions_per={self.method.directions_per!r} needs a batch of tensors with the examples along dimension 0, but {error}; "
                "call step(loss_fn, batch), or set directions_per to 'batch'."
            ) from None
        sizes, first = self.workers.sizes(sizes)
        number = max(1, self.method.parts(sum(sizes)) // shared)
        count, everybody = number * each, batches.assign_directions(sizes, number, each)
        owned = everybody[first : first + len(parts)]
        if self.undecided or not self.found.checked:
            self._choose(context, owned[0])
        share = self.workers.share(1, [len(one) for one in owned], _edges(owned, each) if self.workers.several else None)
        work = [(parts[part], owned[part].between(start, stop)) for part, start, stop in share.pieces]
        values, evaluated = None, 0
        if self.apart and work:
            try:
                found = [self.batched_forward.own(loss_fn, part, pairs, seed, step, signs, bool(self.batched)) for part, pairs in work]
                values = torch.cat([losses for losses, _ in found], dim=1)
                evaluated = sum(count for _, count in found)
            except NotBatchableError as error:
                self._give_up(str(error))
        if work and values is None:
            values = torch.cat([self.batched_forward.alone(loss_fn, part, pairs, seed, step, signs) for part, pairs in work], dim=1)
            evaluated = values.numel()
        values, evaluated = self.workers.gather(share, values, evaluated, each=len(signs))
        owners = torch.tensor([direction for one in everybody for direction in one.directions])
        return Losses(values, owners, count, evaluated)

    # -- how, and who evaluates what --------------------------------------------------------------------------------------------------

    def _choose(self, context: StepContext, owned: Owned | None = None) -> None:
        self._take(self.chooser.choose(self.found, context.loss_fn, context.parts, context.seed, context.step, owned))

    def _give_up(self, reason: str) -> None:
        self._take(self.found.give_up(reason))

    def _take(self, found: EvaluationChoice) -> None:
        """Evaluate like this from now on; say why, where that is one point after the other."""
        self.found = replace(found, reason=None)
        if found.reason is None or self.choice == "sequential":  # that is what was asked for
            return
        warnings.warn(
            f"no batched evaluation of this model and loss: {found.reason}. Evaluating one point after the other instead: results are "
            "right, steps are slower; forward_batching='sequential' avoids this warning.",
            stacklevel=5,
        )

    def _share(self, loss_fn: LossFunction, parts: Sequence[Any] | None, points: int) -> Share:
        """What is ours of ``points`` points on these micro-batches; a loss of one number a batch is not to be cut up."""
        if not self.workers.several:
            return Share(range(points), tuple((part, 0, 1) for part in range(1 if parts is None else len(parts))), (), (points, 0))
        if self.found.per_example is None:
            per_example = False
            if parts is not None:
                _, shape, rows = self.chooser.sample(loss_fn, chunk(self.workers, parts[0])[0])
                per_example = shape == (rows,)
            self.found = replace(self.found, per_example=all(self.workers.exchange(per_example)))
        share = self.workers.share(points, [1] if parts is None else [self._width(part) for part in parts])
        if self.forward.sharded:
            together = all(len(block.points) == points and len(block.columns) for block in share.blocks)
            if not together or parts is None or len(parts) > 1:
                raise ValueError(
                    "of sharded weights all processes evaluate the same points together: give step() one batch, of at least an example for "
                    "each process, a loss function with one loss an example, and parallelism='data'."
                )
        return share

    def _reduced(self, loss_fn: LossFunction) -> LossFunction:
        """The loss function, of which workers exchange one number a batch unless it gives one an example."""
        if self.found.per_example or not self.workers.several:
            return loss_fn

        def mean(*batch: Any) -> Any:
            loss = loss_fn(*batch)
            return loss.mean() if isinstance(loss, Tensor) and loss.dim() == 1 else loss

        return mean

    def _width(self, part: Any) -> int:
        return batches.batch_rows(part) if self.found.per_example else 1

    def _pieces(self, parts: Sequence[Any] | None, share: Share) -> list[Any] | None:
        if parts is None or not self.workers.several:
            return None if parts is None else list(parts)
        return [self._piece(parts[part], start, stop) for part, start, stop in share.pieces]

    def _piece(self, part: Any, start: int, stop: int) -> Any:
        width = self._width(part)
        return part if (start, stop) == (0, width) else batches.take(part, torch.arange(start, stop), width)

    def _gathered(self, share: Share, values: Tensor | None, each: int = 1) -> tuple[Tensor, int]:
        return self.workers.gather(share, values, 0 if values is None else values.numel(), each)


def _edges(owned: Sequence[Owned], each: int) -> list[int]:
    """Where the examples of one part, with their ``each`` directions, end and those of the next begin, over all micro-batches."""
    edges, at = [0], 0
    for one in owned:
        changes = [place for place in range(1, len(one)) if one.directions[place] // each != one.directions[place - 1] // each]
        edges += [at + place for place in changes] + [at + len(one)]
        at += len(one)
    return edges
