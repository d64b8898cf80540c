"""The losses of a step: all points in one forward of stacked rows (*batched*), or one point after the other (*sequential*).

Both give the same losses up to rounding. Batched reads every weight once for all points and pays the overhead of a forward once;
sequential needs the activations of one batch only. Batched is possible where the batch's examples can be told apart, the loss is one
number an example, and every parameter that moves is low-rank, a vector, or a thin matrix (an adapter's). A full matrix would need copies
of itself, one a direction.

The first step evaluates some points both ways and gives batched up, with a warning, where they disagree. ``"auto"`` then times the two and
takes sequential only where it is clearly faster (a batch whose stacked activations leave the caches can be). The choice is made once a
run, for losses differ in their last bits: a checkpoint holds it, and the journal has an event where it is sequential.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune import stacking
from zotune.coordinates import Offset
from zotune.estimators import Estimate, Estimator
from zotune.methods import Method
from zotune.probe import Probe
from zotune.stacking import NotStackable, Owned, Stack

LossFunction = Callable[..., Any]
PROBES = ("auto", "batched", "sequential")
#: A batched evaluation of less than so many seconds is mostly calls, of which sequential ones take more.
WORTH_MEASURING = 0.5
#: Sequential has to take less than this fraction of batched's time, so that a run's choice is not a matter of chance.
CLEARLY = 0.8
REPEATS = 3
clock = time.perf_counter


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

    Raises:
        ValueError: another choice; ``"batched"``, or a method with own directions, where a parameter cannot be evaluated at several points
            at once.
    """

    def __init__(self, probe: Probe, method: Method, estimator: Estimator, choice: str) -> None:
        if choice not in PROBES:
            raise ValueError(f"unknown probe {choice!r}; choose one of {', '.join(PROBES)}.")
        dense = probe.dense
        if dense is not None and (method.own or choice == "batched"):
            what = f"num_directions={method.num_directions!r}" if method.own else "probe='batched'"
            raise ValueError(
                f"{what} is not possible for {dense.name}, a weight of shape {tuple(dense.parameter.shape)} that moves in full space; "
                "use a low-rank method (lozo, lozo-m) or train an adapter (PEFT)."
            )
        self.probe, self.method, self.estimator, self.choice = probe, method, estimator, choice
        self.eps: float = math.nan if isinstance(method.eps, str) else method.eps  # set by the optimizer where it is measured
        #: None until the first step has found out
        self.batched: bool | None = False if choice == "sequential" or dense is not None else None
        self.checked = False  # that the loss is one number an example

    def restore(self, batched: bool | None) -> None:
        """Go on as the run did so far, where this one was not asked to do otherwise."""
        if self.choice != "sequential" and self.probe.dense is None:
            self.batched = batched

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
            self._decide(loss_fn, parts, seed, step)
        if self.batched and parts is not None:
            try:
                values = torch.cat([self._stacked(loss_fn, part, self._shared(part, seed, step)) for part in parts], dim=1)
                return Losses(values, None, self.method.directions_of(0), values.numel())
            except NotStackable as error:
                self._give_up(str(error))
        evaluate = evaluation(loss_fn, parts)
        rows = [self.probe.evaluate(evaluate, Offset(point.sign * eps, seed, step, point.direction)) for point in points]
        values = torch.stack(rows)
        return Losses(values, None, self.method.directions_of(0), values.numel())

    def _tangents(self, loss_fn: LossFunction, parts: Sequence[Any] | None, seed: int, step: int) -> Losses:
        """Losses and their derivatives along every direction, 2K rows."""
        calls = [loss_fn] if parts is None else [partial(loss_fn, part) for part in parts]
        rows: list[Tensor] = []
        for direction in range(self.method.directions_of(0)):
            found = [self.probe.tangent(call, Offset(0.0, seed, step, direction)) for call in calls]
            rows += [as_losses([loss for loss, _ in found]), as_losses([tangent for _, tangent in found])]
        values = torch.stack(rows)
        return Losses(values, None, self.method.directions_of(0), values.numel() // 2)

    # -- one forward ----------------------------------------------------------------------------------------------------------------

    def _shared(self, part: Any, seed: int, step: int) -> Stack:
        points = self.estimator.points(self.method.directions_of(0))
        return stacking.shared(points, self.eps, stacking.batch_rows(part), seed, step)

    def _stacked(self, loss_fn: LossFunction, part: Any, stack: Stack) -> Tensor:
        rows = stacking.take(part, stack.source, stacking.batch_rows(part))
        losses = self.probe.evaluate_stacked(lambda: as_losses([loss_fn(rows)]), stack)
        if losses.numel() != stack.total:
            raise NotStackable(f"the loss of {stack.total} stacked examples is {losses.numel()} numbers")
        return losses[stack.losses.to(losses.device)]

    # -- a direction per example, or per group of examples ------------------------------------------------------------------------------

    def around(self, loss_fn: LossFunction, parts: Sequence[Any] | None, seed: int, step: int) -> Losses:
        """The losses at θ, θ + εZ and θ − εZ, (3, N), one direction Z to every two neighbouring parts of the examples."""
        return self._own(loss_fn, parts, seed, step, (0, +1, -1), 1, shared=2)

    def _own(
        self,
        loss_fn: LossFunction,
        parts: Sequence[Any] | None,
        seed: int,
        step: int,
        signs: Sequence[int],
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
        number = max(1, self.method.parts(sum(sizes)) // shared)
        count, shares = number * each, stacking.share_out(sizes, number, each)
        if self.batched is None or not self.checked:
            self._decide(loss_fn, parts, seed, step, shares[0])
        values = None
        if self.batched:
            try:
                stacks = [stacking.own(signs, self.eps, share, seed, step) for share in shares]
                values = [self._stacked(loss_fn, part, stack) for part, stack in zip(parts, stacks, strict=True)]
                evaluated = sum(stack.total for stack in stacks)
            except NotStackable as error:
                self._give_up(str(error))
        if values is None:
            values = [self._alone(loss_fn, part, share, seed, step, signs) for part, share in zip(parts, shares, strict=True)]
            evaluated = len(signs) * sum(map(len, shares))
        owners = torch.tensor([direction for share in shares for direction in share.directions])
        return Losses(torch.cat(values, dim=1), owners, count, evaluated)

    def _alone(
        self,
        loss_fn: LossFunction,
        part: Any,
        owned: Owned,
        seed: int,
        step: int,
        signs: Sequence[int],
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

    # -- which of the two ---------------------------------------------------------------------------------------------------------------

    def _decide(self, loss_fn: LossFunction, parts: Sequence[Any] | None, seed: int, step: int, owned: Owned | None = None) -> None:
        """Try a batched evaluation of the first micro-batch and compare some of its points with sequential ones."""
        rows = None
        try:
            if parts is not None:
                rows = stacking.batch_rows(parts[0])
        except NotStackable:
            pass
        if parts is None or rows is None:
            self.batched = False
            return
        part, shapes = parts[0], []

        def noting() -> Tensor:
            loss = loss_fn(part)
            shapes.append(tuple(getattr(loss, "shape", ())))
            return as_losses([loss])

        here = self.probe.evaluate(noting, Offset(0.0, seed, step, 0))
        if shapes[0] != (rows,):
            if owned is not None:
                raise ValueError(
                    f"num_directions={self.method.num_directions!r} needs one loss per example, and the loss function returned shape "
                    f"{shapes[0]} for {rows} examples; return losses of shape (B,), or set num_directions to a number."
                )
            self.batched = False
            return
        self.checked = True
        if self.batched is not None:
            return
        if owned is None:
            points = self.estimator.points(self.method.directions_of(0))
            chosen = [i for i, point in enumerate(points) if point.direction in (0, points[-1].direction)]
            evaluate = evaluation(loss_fn, [part])
            offsets = [Offset(points[i].sign * self.eps, seed, step, points[i].direction) for i in chosen]

            def sequentially() -> Tensor:
                return torch.stack([self.probe.evaluate(evaluate, offset) for offset in offsets])

            slow = sequentially()
            stack = self._shared(part, seed, step)
        else:
            ends = sorted({owned.directions[0], owned.directions[-1]})
            columns = [pair for direction in ends for pair, owner in enumerate(owned.directions) if owner == direction]

            def sequentially() -> Tensor:
                return self._alone(loss_fn, part, owned, seed, step, self.estimator.signs, only=ends)

            slow = sequentially()
            here = here[[owned.examples[pair] for pair in columns]]
            stack = stacking.own(self.estimator.signs, self.eps, owned, seed, step)
        try:
            quick = self._stacked(loss_fn, part, stack)
            quick = quick[chosen] if owned is None else quick[:, columns]
        except Exception as error:  # whatever a model or a loss does with rows it did not expect
            self._give_up(str(error))
            return
        if self.probe.agree(quick, slow, here):
            self.batched = self.choice == "batched" or not self._sequential_is_faster(
                lambda: self._stacked(loss_fn, part, stack),
                sequentially,
                share=slow.numel() / stack.losses.numel(),
            )
        else:
            self._give_up(f"its losses are {quick.mean():.6g} on average, those of one point after the other {slow.mean():.6g}")

    def _sequential_is_faster(self, batched: Callable[[], Tensor], sequential: Callable[[], Tensor], share: float) -> bool:
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

    def _give_up(self, reason: str) -> None:
        self.batched = False
        warnings.warn(
            f"no batched evaluation of this model and loss: {reason}. Evaluating one point after the other instead: results are right, "
            "steps are slower; probe='sequential' avoids this warning.",
            stacklevel=4,
        )


def evaluation(loss_fn: LossFunction, parts: Sequence[Any] | None) -> Callable[[], Tensor]:
    """A function without arguments that gives the losses of all micro-batches, float32, shape (n,)."""
    if parts is None:
        return lambda: as_losses([loss_fn()])
    return lambda: as_losses([loss_fn(part) for part in parts])


def as_losses(parts: list[Any]) -> Tensor:
    """What a loss function returned for each micro-batch, as one float32 tensor of shape (n,).

    Raises:
        ValueError: one of them is neither a scalar nor one loss per example.
    """
    losses = []
    for part in parts:
        loss = part if isinstance(part, Tensor) else torch.as_tensor(part, dtype=torch.float32)
        if loss.dim() > 1:
            raise ValueError(f"the loss function returned shape {tuple(loss.shape)}; return one loss per example, shape (B,), or a scalar.")
        losses.append(loss.detach().float().reshape(-1))
    return torch.cat(losses)
