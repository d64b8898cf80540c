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

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune import deciding, stacking
from zotune.captured import Captures
from zotune.coordinates import Offset
from zotune.distributed.workers import Share, Workers
from zotune.estimators import Estimate, Estimator, Point
from zotune.loss_values import LossFunction, as_losses, evaluation, losses_of
from zotune.methods import Method
from zotune.probe import Probe
from zotune.sending import send, send_list
from zotune.stacking import NotStackable, Owned, Stack

PROBES = ("auto", "batched", "sequential")
#: Neighbouring parts of a batch that have a direction in common where curvature is measured.
SHARED = 2


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had no finite loss to learn from."""


class Losses(NamedTuple):
    """Losses of a step's examples, points × examples.

    Attributes:
        values: (P, N): by point of the estimator; with own directions by sign, an example once for each direction it has.
        owners: with own directions the direction of each column, (N,).
        num_directions: K.
        evaluated: sequences that went through the model for them.
    """

    values: Tensor
    owners: Tensor | None
    num_directions: int
    evaluated: int

    def estimate(self, estimator: Estimator, eps: float) -> Estimate:
        values = self.values.cpu()  # the step's one wait for the device
        if self.owners is None:
            return estimator.estimate(list(values), eps, self.num_directions)
        return estimator.estimate_own(values, self.owners, eps, self.num_directions)


class Evaluations:
    """Gathers the losses of steps.

    Args:
        probe: evaluates the model.
        method: says which points.
        estimator: the method's.
        choice: ``"auto"``, ``"batched"`` or ``"sequential"``.
        workers: who evaluates with us; None: nobody.
        capture: what is recorded and replayed (see ``captured``).

    Raises:
        ValueError: another choice; ``"batched"``, or a method with own directions, where a parameter cannot be evaluated at several points
            at once.
    """

    def __init__(
        self, probe: Probe, method: Method, estimator: Estimator, choice: str, workers: Workers | None = None, capture: bool | str = "auto"
    ) -> None:
        if choice not in PROBES:
            raise ValueError(f"unknown probe {choice!r}; choose one of {', '.join(PROBES)}.")
        dense = probe.dense
        together = dense is None or (choice == "batched" and method.num_directions == 1 and probe.dense_together)
        if not together and (method.own or choice == "batched"):
            assert dense is not None
            what = f"num_directions={method.num_directions!r}" if method.own else "probe='batched'"
            raise ValueError(
                f"{what} is not possible for {dense.name}, a weight of shape {tuple(dense.parameter.shape)} that moves in full space; "
                "use one direction a step, a low-rank method (lozo, lozo-m) or an adapter (PEFT)."
            )
        self.probe, self.method, self.estimator, self.choice = probe, method, estimator, choice
        self.workers = workers or Workers()
        self.captures = Captures(probe, capture)
        self.eps: float = math.nan if isinstance(method.eps, str) else method.eps  # set by the optimizer where it is measured
        #: None until the first step has found out
        self.batched: bool | None = None if choice != "sequential" and together and not probe.sharded else False
        #: With own directions: whether the rows of a forward can be under different ones; None until the first step has found out
        self.apart: bool | None = None if method.own and not probe.sharded else False
        self.checked = False  # that the loss is one number an example, where the method needs that
        #: Whether it is; None until somebody had to know: who shares out a batch has to
        self.per_example: bool | None = None

    @property
    def undecided(self) -> bool:
        """Whether the next step has to find out how it can be evaluated."""
        return self.batched is None or self.apart is None

    def restore(self, batched: bool | None, apart: bool | None) -> None:
        """Go on as the run did so far, where this one was not asked to do otherwise."""
        if self.probe.sharded:
            return
        if self.choice != "sequential" and (self.probe.dense is None or self.choice == "batched"):
            self.batched = batched
        if self.method.own:
            self.apart = apart

    def event(self) -> dict[str, Any]:
        """How the run is evaluated, for its journal, where that is not batched."""
        return {"event": "probe", "batched": bool(self.batched), **({"apart": bool(self.apart)} if self.method.own else {})}

    def gather(self, loss_fn: LossFunction, parts: Sequence[Any] | None, seed: int, step: int) -> Losses:
        """The losses of step ``step``.

        Args:
            loss_fn: of one micro-batch, or without arguments where ``parts`` is None.
            parts: the step's micro-batches.

        Raises:
            ValueError: the loss has no shape that the method can use.
        """
        if self.method.own:
            return self._own(loss_fn, parts, seed, step, self.estimator.signs, self.method.each)
        if self.method.estimator == "tangent":
            return self._tangents(loss_fn, parts, seed, step)
        points, eps = self.estimator.points(self.method.directions_of(0)), self.eps
        if self.batched is None:
            deciding.decide(self, loss_fn, parts, seed, step)
        share = self._share(loss_fn, parts, len(points))
        mine = [points[place] for place in share.points]
        values = None
        if share.pieces and self.batched and parts is not None:
            try:
                stacks = [self.shared(piece, mine, seed, step) for piece in self._pieces(parts, share) or ()]
                values = torch.cat([self.stacked(loss_fn, piece, stack) for piece, stack in stacks], dim=1)
            except NotStackable as error:
                self.give_up(str(error))
        if share.pieces and values is None and parts is not None and self.captures.on:
            values = self._one_by_one(loss_fn, self._pieces(parts, share) or (), mine, seed, step)
        if share.pieces and values is None:
            evaluate = evaluation(self._told(loss_fn), self._pieces(parts, share))
            rows = [self.probe.evaluate(evaluate, Offset(point.sign * eps, seed, step, point.direction)) for point in mine]
            values = torch.stack(rows)
        values, evaluated = self._gathered(share, values)
        return Losses(values, None, self.method.directions_of(0), evaluated)

    def function(self, loss_fn: LossFunction, parts: Sequence[Any] | None) -> Callable[[], Tensor]:
        """A function without arguments that gives the losses of the step's examples, everybody's, float32, (N,)."""
        if not self.workers.several:
            return evaluation(loss_fn, parts)
        share = self._share(loss_fn, parts, 1)
        evaluate = evaluation(self._told(loss_fn), self._pieces(parts, share)) if share.pieces else None

        def losses() -> Tensor:
            values = None if evaluate is None else evaluate().unsqueeze(0)
            return self._gathered(share, values)[0][0]

        return losses

    def table(
        self, loss_fn: LossFunction, parts: Sequence[Any] | None, each: int, rows_of: Callable[[Callable[[], Tensor]], Tensor]
    ) -> tuple[Tensor, int]:
        """Everybody's table (each, N) of what ``rows_of`` makes of every micro-batch's losses, and the sequences evaluated for it.

        Args:
            rows_of: (each, n) of a function that evaluates the losses of n examples, float32, (n,).
        """
        share = self._share(loss_fn, parts, 1)
        pieces = self._pieces(parts, share) if share.pieces else []
        told = self._told(loss_fn)
        found = [rows_of(evaluation(told, part)) for part in ([None] if pieces is None else [[piece] for piece in pieces])]
        values, evaluated = self._gathered(share, torch.cat(found, dim=1) if found else None, each)
        return values, evaluated // each

    def _tangents(self, loss_fn: LossFunction, parts: Sequence[Any] | None, seed: int, step: int) -> Losses:
        """Losses and their derivatives along every direction, 2K rows."""
        share = self._share(loss_fn, parts, self.method.directions_of(0))
        pieces = self._pieces(parts, share) if share.pieces else []
        told = self._told(loss_fn)
        calls = [told] if pieces is None else [partial(told, piece) for piece in pieces]
        rows: list[Tensor] = []
        for direction in share.points if calls else ():
            found = [self.probe.tangent(call, Offset(0.0, seed, step, direction)) for call in calls]
            rows += [as_losses([loss for loss, _ in found]), as_losses([tangent for _, tangent in found])]
        values, evaluated = self._gathered(share, torch.stack(rows) if rows else None, each=2)
        return Losses(values, None, self.method.directions_of(0), evaluated // 2)

    # -- who evaluates what ---------------------------------------------------------------------------------------------------------

    def _share(self, loss_fn: LossFunction, parts: Sequence[Any] | None, points: int) -> Share:
        """What is ours of ``points`` points on these micro-batches; a loss of one number a batch is not to be cut up."""
        if not self.workers.several:
            return Share(range(points), tuple((part, 0, 1) for part in range(1 if parts is None else len(parts))), (), (points, 0))
        if self.per_example is None:
            self.per_example = False
            if parts is not None:
                deciding.look(self, loss_fn, self.chunk(parts[0])[0])
            self.per_example = all(self.workers.exchange(self.per_example))
        share = self.workers.share(points, [1] if parts is None else [self._width(part) for part in parts])
        if self.probe.sharded:
            together = all(len(block.points) == points and len(block.columns) for block in share.blocks)
            if not together or parts is None or len(parts) > 1:
                raise ValueError(
                    "of sharded weights all processes evaluate the same points together: give step() one batch, of at least an example for "
                    "each process, a loss function with one loss an example, and share='data'."
                )
        return share

    def _told(self, loss_fn: LossFunction) -> LossFunction:
        """The loss function, of which workers tell each other one number a batch unless it gives one an example."""
        if self.per_example or not self.workers.several:
            return loss_fn

        def mean(*batch: Any) -> Any:
            loss = loss_fn(*batch)
            return loss.mean() if isinstance(loss, Tensor) and loss.dim() == 1 else loss

        return mean

    def _width(self, part: Any) -> int:
        return stacking.batch_rows(part) if self.per_example else 1

    def _pieces(self, parts: Sequence[Any] | None, share: Share) -> list[Any] | None:
        if parts is None or not self.workers.several:
            return None if parts is None else list(parts)
        return [self._piece(parts[part], start, stop) for part, start, stop in share.pieces]

    def _piece(self, part: Any, start: int, stop: int) -> Any:
        width = self._width(part)
        return part if (start, stop) == (0, width) else stacking.take(part, torch.arange(start, stop), width)

    def _gathered(self, share: Share, values: Tensor | None, each: int = 1) -> tuple[Tensor, int]:
        return self.workers.gather(share, values, 0 if values is None else values.numel(), each)

    def chunk(self, part: Any, owned: Owned | None = None) -> tuple[Any, Owned | None]:
        """The examples of a micro-batch that we try things out on, and whose their directions are."""
        try:
            rows = stacking.batch_rows(part)
        except NotStackable:
            return part, owned
        chunk = self.workers.chunk(rows)
        if len(chunk) == rows:
            return part, owned
        if owned is not None:
            pairs = [(e - chunk.start, d) for e, d in zip(owned.examples, owned.directions, strict=True) if e in chunk]
            owned = Owned(tuple(e for e, _ in pairs), tuple(d for _, d in pairs))
        return stacking.take(part, torch.arange(chunk.start, chunk.stop), rows), owned

    def trial(self, loss_fn: LossFunction, parts: Sequence[Any] | None) -> Callable[[], Tensor]:
        """A function without arguments that gives losses for us to compare evaluations by; no worker waits for another in it."""
        return evaluation(loss_fn, None if parts is None else [self.chunk(part)[0] for part in parts])

    # -- one forward ----------------------------------------------------------------------------------------------------------------

    def shared(self, part: Any, points: Sequence[Point], seed: int, step: int) -> tuple[Any, Stack]:
        return part, stacking.shared(points, self.eps, stacking.batch_rows(part), seed, step)

    def _one_by_one(self, loss_fn: LossFunction, pieces: Sequence[Any], points: Sequence[Point], seed: int, step: int) -> Tensor | None:
        """The losses of these points from recordings of one point each, (P, N); None where that is not possible."""
        rows = []
        try:
            for point in points:
                losses = []
                for piece in pieces:
                    _, stack = self.shared(piece, [point], seed, step)
                    found = self.captures.losses(loss_fn, partial(losses_of, loss_fn), piece, stack)
                    if found is None or found.numel() != stack.total:
                        return None
                    losses.append(found)
                rows.append(torch.cat(losses))
        except NotStackable:
            return None
        return torch.stack(rows)

    def stacked(self, loss_fn: LossFunction, part: Any, stack: Stack) -> Tensor:
        rows = stacking.take(part, stack.source, stacking.batch_rows(part))
        losses = self.captures.losses(loss_fn, partial(losses_of, loss_fn), rows, stack)
        if losses is None:
            losses = self.probe.evaluate_stacked(partial(losses_of, loss_fn, rows), stack)
        if losses.numel() != stack.total:
            raise NotStackable(f"the loss of {stack.total} stacked examples is {losses.numel()} numbers")
        return losses[send(stack.losses, losses.device)]

    # -- a direction per example, or per group of examples ------------------------------------------------------------------------------

    def around(self, loss_fn: LossFunction, parts: Sequence[Any] | None, seed: int, step: int, scale: float = 1) -> Losses:
        """The losses at θ and θ ± scale · εZ, (3, N), one direction Z to every :data:`SHARED` neighbouring parts of the examples."""
        return self._own(loss_fn, parts, seed, step, (0, +scale, -scale), 1, shared=SHARED)

    def _own(
        self,
        loss_fn: LossFunction,
        parts: Sequence[Any] | None,
        seed: int,
        step: int,
        signs: Sequence[float],
        each: int,
        shared: int = 1,
    ) -> Losses:
        try:
            if parts is None:
                raise NotStackable("a closure has no batch")
            sizes = [stacking.batch_rows(part) for part in parts]
        except NotStackable as error:
            raise ValueError(
                f"num_directions={self.method.num_directions!r} needs a batch of tensors with the examples along dimension 0, but {error}; "
                "call step(loss_fn, batch), or set num_directions to a number."
            ) from None
        sizes, first = self.workers.sizes(sizes)
        number = max(1, self.method.parts(sum(sizes)) // shared)
        count, everybody = number * each, stacking.share_out(sizes, number, each)
        owned = everybody[first : first + len(parts)]
        if self.undecided or not self.checked:
            deciding.decide(self, loss_fn, parts, seed, step, owned[0])
        share = self.workers.share(1, [len(one) for one in owned], _edges(owned, each) if self.workers.several else None)
        work = [(parts[part], owned[part].between(start, stop)) for part, start, stop in share.pieces]
        values, evaluated = None, 0
        if self.apart and work:
            try:
                found = [self.at_own(loss_fn, part, pairs, seed, step, signs) for part, pairs in work]
                values = torch.cat([losses for losses, _ in found], dim=1)
                evaluated = sum(count for _, count in found)
            except NotStackable as error:
                self.give_up(str(error))
        if work and values is None:
            values = torch.cat([self.alone(loss_fn, part, pairs, seed, step, signs) for part, pairs in work], dim=1)
            evaluated = values.numel()
        values, evaluated = self.workers.gather(share, values, evaluated, each=len(signs))
        owners = torch.tensor([direction for one in everybody for direction in one.directions])
        return Losses(values, owners, count, evaluated)

    def at_own(
        self, loss_fn: LossFunction, part: Any, owned: Owned, seed: int, step: int, signs: Sequence[float], together: bool | None = None
    ) -> tuple[Tensor, int]:
        """Losses (S, pairs) of examples under their directions, and how many rows that took: in one forward, or in forwards of a batch's
        rows at most, every sign by itself."""
        if self.batched if together is None else together:
            stack = stacking.own(signs, self.eps, owned, seed, step)
            return self.stacked(loss_fn, part, stack), stack.total
        rows, size, evaluated = [], stacking.batch_rows(part), 0
        for sign in signs:
            if not sign:
                here = self.probe.evaluate(evaluation(loss_fn, [part]), Offset(0.0, seed, step, 0))
                rows.append(here[send_list(owned.examples, here.device)])
                evaluated += size
                continue
            pieces = [owned.between(start, min(start + size, len(owned))) for start in range(0, len(owned), size)]
            stacks = [stacking.own((sign,), self.eps, piece, seed, step) for piece in pieces]
            rows.append(torch.cat([self.stacked(loss_fn, part, stack)[0] for stack in stacks]))
            evaluated += sum(stack.total for stack in stacks)
        return torch.stack(rows), evaluated

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
        columns, size = [], stacking.batch_rows(part)
        for direction in sorted(set(owned.directions)) if only is None else only:
            index = torch.tensor([row for row, owner in zip(owned.examples, owned.directions, strict=True) if owner == direction])
            group = stacking.take(part, index, size)
            offsets = [Offset(sign * self.eps, seed, step, direction) for sign in signs]
            losses = [self.probe.evaluate(evaluation(loss_fn, [group]), offset) for offset in offsets]
            columns.append(torch.stack(losses))
        return torch.cat(columns, dim=1)

    def give_up(self, reason: str) -> None:
        """Evaluate one point after the other from now on, and say why."""
        self.batched = self.apart = False
        if self.choice == "sequential":
            return  # that is what was asked for
        warnings.warn(
            f"no batched evaluation of this model and loss: {reason}. Evaluating one point after the other instead: results are right, "
            "steps are slower; probe='sequential' avoids this warning.",
            stacklevel=4,
        )


def _edges(owned: Sequence[Owned], each: int) -> list[int]:
    """Where the examples of one part, with their ``each`` directions, end and those of the next begin, over all micro-batches."""
    edges, at = [0], 0
    for one in owned:
        changes = [place for place in range(1, len(one)) if one.directions[place] // each != one.directions[place - 1] // each]
        edges += [at + place for place in changes] + [at + len(one)]
        at += len(one)
    return edges
