"""The probe: evaluates a model at θ + offset without writing to any weight.

Two ways to show a module a perturbed weight:

- **lent parameters** (general, any module): for the length of an evaluation the module's parameter table is exchanged for one that
  computes θ + offset at the moment somebody reads ``module.weight``, and nothing keeps it longer than that somebody does. It does not
  matter whether the module reads it in its own forward or a parent reaches in (``nn.MultiheadAttention`` does).
- **side paths** (``uses_hook``): low-rank coordinates of Linear, Conv1D and Embedding layers, no weight formed at all.

Several points at once (``stacking``) are evaluated by context *stacked parameters*, for layers of any kind that have a batched form.

Either way the stored tensors are only read: whatever is raised inside a forward, the model is bit for bit what it was, and the tables are
back in place. :meth:`PerturbedForward.prepare` compares the two ways on real data once and distrusts side paths that disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zotune.forward import materialized, path_check
from zotune.forward.batch_context import BatchContext
from zotune.forward.batched import batched_parameter
from zotune.forward.batches import BatchLayout
from zotune.forward.jvp import ForwardMode, dual
from zotune.forward.lazy_weight import Room
from zotune.forward.low_rank_hook import LowRankHook
from zotune.forward.overrides import Makers, OverriddenParameters, Overrides
from zotune.forward.siblings import siblings_of
from zotune.rng.counter import prefetch
from zotune.rng.directions import Directions, Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.flat_buffer import build_flat_buffers
from zotune.subspaces.multi_tensor import build_multi_tensor_groups
from zotune.weights import placement
from zotune.weights.placement import is_sharded
from zotune.weights.precision import HALF
from zotune.weights.structure import module_mode

T = TypeVar("T")


class PerturbedForward:
    """Evaluates functions of a model at points θ + offset.

    Args:
        model: any module.
        coordinates: the coordinates of its trainable parameters (see ``subspaces``).
        directions: the distribution of Z.

    Example:
        >>> from zotune.subspaces import Full
        >>> model = nn.Linear(3, 1)
        >>> probe = PerturbedForward(model, [Full().coordinate(n, p) for n, p in model.named_parameters()], Directions("gaussian"))
        >>> plus = probe.evaluate(lambda: model(torch.ones(1, 3)), Offset(1e-3, seed=0, step=0, direction=0))
    """

    def __init__(self, model: nn.Module, coordinates: Sequence[Coordinate], directions: Directions) -> None:
        self.model = model
        self.directions = directions
        self.coordinates = list(coordinates)
        self._low_rank = [c for c in self.coordinates if isinstance(c, LowRankCoordinate)]
        self._flat_buffers = build_flat_buffers(self.coordinates)
        build_multi_tensor_groups(self.coordinates, directions)
        self._names = [c.name for c in self.coordinates]
        self.devices = sorted({c.device for c in self.coordinates}, key=str)
        self._overrides = Overrides(model, self.coordinates)
        self.siblings = siblings_of(model, {id(c.parameter): c for c in self.coordinates})
        #: Whether a parameter, trained or not, is split among processes: all of them then have to evaluate the same points together.
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        #: Whether a parameter is away between forwards (``residence``), so that every forward brings it in again.
        self.streams = any(placement.offload_handle(parameter) is not None for parameter in model.parameters())
        self.forward_mode = ForwardMode()
        self.low_rank_hooks: list[LowRankHook] = []
        self._attach_side_paths()
        owned = Counter(id(c) for owner in self._overrides.owners for c in owner.parameters.values())
        #: Names of weights that one layer alone reads, on a device where it may materialize them.
        self._formable = {
            c.name
            for owner in self._overrides.owners
            for c in owner.parameters.values()
            if isinstance(c, LowRankCoordinate)
            and owner.rule is not None
            and owned[id(c)] == 1
            and not self.sharded
            and owner.rule.materializes(owner.module, c)
        }

    # -- evaluation ---------------------------------------------------------------------------------------------------------------

    def evaluate(self, function: Callable[[], T], offset: Offset | None, only: Collection[str] | None = None) -> T:
        """``function()`` with the model at θ + offset (None: at θ); no autograd graph, evaluation mode, generators isolated.

        ``only`` moves no coordinates but the named ones.
        """
        # Not inference_mode, though that takes a few percent less: what a model or a loss keeps from a forward (a table of positions, a
        # running mean) has to stay an ordinary tensor, for a later backward pass or an update in place.
        with torch.no_grad(), module_mode(self.model, training=False), self.at(offset, only=only):
            if offset is None:
                return function()
            with isolated_generators(Key(offset.seed, offset.step, 0, "", "loss"), self.devices):
                return function()

    def tangent(self, function: Callable[[], Any], offset: Offset) -> tuple[Tensor, Tensor]:
        """The loss ``function()`` at θ and its derivative along the direction of ``offset``, in one forward; see ``forward_mode``.

        Raises:
            ValueError: something between the weights and the loss has no forward derivative.
        """
        makers = self._overrides.makers(dual, self.directions, offset)
        key = Key(offset.seed, offset.step, 0, "", "loss")
        with torch.no_grad(), module_mode(self.model, training=False), self._lent(makers):
            return self.forward_mode.derivative(function, lambda: isolated_generators(key, self.devices))

    def evaluate_batched(self, function: Callable[[], T], stack: BatchLayout) -> T:
        """``function()`` on stacked rows, each block of rows at its own point.

        Raises:
            NotBatchableError: the model does something with a parameter that has no batched form.
        """
        with isolated_generators(Key(stack.seed, stack.step, 0, "", "loss"), self.devices):
            return self.evaluate_in(function, BatchContext(stack, self.directions, self.siblings))

    def evaluate_in(self, function: Callable[[], T], context: BatchContext) -> T:
        """:meth:`evaluate_batched` with what is lent given, and the generators as they are."""
        with torch.no_grad(), module_mode(self.model, training=False), self._stacked(context):
            return function()

    @contextmanager
    def _stacked(self, context: BatchContext) -> Iterator[None]:
        try:
            with self._lent(self._overrides.makers(batched_parameter, context)):
                for coordinate in self._low_rank:
                    coordinate.moved = None  # side paths keep out
                yield
        finally:
            context.end()

    @property
    def dense(self) -> Coordinate | None:
        """A coordinate of which several directions cannot be evaluated at once, if there is one."""
        return next((c for c in self.coordinates if not c.thin), None)

    @property
    def batches_dense(self) -> bool:
        """Whether all points of one direction can be evaluated at once all the same: by a weight for each, formed layer by layer."""
        return all(c.thin or (type(c) is FullCoordinate and len(c.shape) == 2) for c in self.coordinates)

    @contextmanager
    def at(self, offset: Offset | None, *, low_rank_hooks: bool = True, only: Collection[str] | None = None) -> Iterator[list[OverriddenParameters]]:
        """Show the model θ + offset for the length of a block.

        ``low_rank_hooks=False`` takes the general way everywhere; ``only`` moves no coordinates but the named ones.
        """
        makers: dict[int, Makers] = {}
        room = Room(sum(coordinate.numel for coordinate in self.coordinates))
        if offset is not None:
            for owner in self._overrides.owners:
                for name, coordinate in owner.parameters.items():
                    if only is not None and coordinate.name not in only:
                        continue
                    if not (low_rank_hooks and isinstance(coordinate, LowRankCoordinate) and coordinate.uses_hook):
                        makers.setdefault(id(owner), {})[name] = owner.maker(coordinate, self.directions, offset, room)
                    elif self._forms(coordinate, offset):
                        makers.setdefault(id(owner), {})[name] = materialized.lender(coordinate, self.directions, offset)
        with self._lent(makers) as tables:
            for coordinate in self._low_rank:
                moves = only is None or coordinate.name in only
                if moves and (not low_rank_hooks or self._forms(coordinate, offset)):
                    coordinate.moved = None  # the weight that is lent has A in it already
                elif moves and coordinate.uses_hook:
                    still = offset is None or not coordinate.is_active(offset.step, offset.direction)
                    coordinate.shift(self.directions, None if still else offset)
            yield tables

    def _forms(self, coordinate: LowRankCoordinate, offset: Offset | None) -> bool:
        """Whether its layer is lent a weight that it may form, instead of going low_rank_output."""
        here = coordinate.uses_hook and coordinate.name in self._formable
        return here and offset is not None and coordinate.is_active(offset.step, offset.direction)

    def replace_coordinates(self, coordinates: Mapping[str, Any]) -> AbstractContextManager[None]:
        """For the length of a block, evaluate with other objects in place of the coordinates of these names; they need :meth:`at`."""
        return self._overrides.replace_coordinates(coordinates)

    def _lent(self, makers: Mapping[int, Makers]) -> AbstractContextManager[list[OverriddenParameters]]:
        """Modules read what ``makers`` make; afterwards tables and hooks are as they were."""
        return self._overrides.lent(makers, self._rest)

    def _rest(self) -> None:
        """Hooks add what belongs to θ."""
        for coordinate in self._low_rank:
            coordinate.shift(self.directions, None)

    # -- side paths ---------------------------------------------------------------------------------------------------------------

    def _attach_side_paths(self) -> None:
        for coordinate in self._low_rank:
            owners = [(o.module, name) for o in self._overrides.owners for name, c in o.parameters.items() if c is coordinate]
            if not all(LowRankHook.fits(module, name) for module, name in owners):
                coordinate.fold_every_step()
                continue
            try:
                self.low_rank_hooks += [LowRankHook(module, name, coordinate) for module, name in owners]
            except ValueError:
                self.detach()
                raise

    def prefetch(self, seed: int, step: int) -> None:
        """While a device is busy: what the directions of ``step`` will need of the host."""
        if len(self.devices) == 1 and self.devices[0].type != "cpu":
            prefetch(seed, step, self._names, self.devices[0])
            for buffer in self._flat_buffers:
                buffer.prefetch(self.directions, seed, step)

    def drop_directions(self) -> None:
        """Let go of directions that are kept between a step's evaluations and its update."""
        for coordinate in self.coordinates:
            coordinate.drop()

    def disable_hooks(self, names: Sequence[str]) -> None:
        """Give the named coordinates the general way from now on."""
        for path in [p for p in self.low_rank_hooks if p.coordinate.name in names]:
            path.remove()
            self.low_rank_hooks.remove(path)
        for coordinate in self._low_rank:
            if coordinate.name in names and coordinate.uses_hook:
                coordinate.fold_every_step()

    def detach(self) -> None:
        """Remove every hook from the model."""
        for path in self.low_rank_hooks:
            path.remove()
        self.low_rank_hooks.clear()

    def agree(self, quick: Tensor, slow: Tensor, here: Tensor) -> bool:
        """Whether two evaluations of perturbed losses differ by rounding and 5% of what the perturbation changes; ``here``: at θ."""
        half = any(p.dtype in HALF for p in self.model.parameters())  # a float32 adapter on a half-precision model, for one
        return path_check.agree(quick, slow, here, half=half)

    def prepare(self, function: Callable[[], Tensor], offset: Offset) -> list[str]:
        """Compare hooks and general way on one evaluation; the names of coordinates that go the general way from now on.

        Each finding is a warning; see :mod:`zotune.forward.path_check`.
        """
        if not self.low_rank_hooks:
            return []
        key = Key(offset.seed, offset.step, 0, "", "loss")

        def evaluate(at: Offset | None, hooks: bool, only: Collection[str] | None) -> tuple[Tensor, list[OverriddenParameters]]:
            with (
                torch.no_grad(),
                module_mode(self.model, training=False),
                self.at(at, low_rank_hooks=hooks, only=only) as tables,
                isolated_generators(key, self.devices),
            ):
                return function().detach().float(), tables

        return path_check.check(evaluate, self.low_rank_hooks, offset, self.agree, self.disable_hooks)
