"""The probe: evaluates a model at θ + offset without writing to any weight.

Two ways to show a module a perturbed weight:

- **lent parameters** (general, any module): for the length of an evaluation the module's parameter table is exchanged for one that
  computes θ + offset at the moment somebody reads ``module.weight``, and nothing keeps it longer than that somebody does. It does not
  matter whether the module reads it in its own forward or a parent reaches in (``nn.MultiheadAttention`` does).
- **side paths** (``side_path``): low-rank coordinates of Linear, Conv1D and Embedding layers, no weight formed at all.

Several points at once (``stacking``) are evaluated by lending *stacked parameters*, for layers of any kind that have a batched form.

Either way the stored tensors are only read: whatever is raised inside a forward, the model is bit for bit what it was, and the tables are
back in place. :meth:`Probe.prepare` compares the two ways on real data once and distrusts side paths that disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zotune.forward import materialized, path_check
from zotune.forward.batch_context import Lending
from zotune.forward.batch_layout import Stack
from zotune.forward.batched import lend
from zotune.forward.jvp import ForwardMode, dual
from zotune.forward.lazy_weight import Room
from zotune.forward.low_rank_hook import SidePath
from zotune.forward.overrides import LentParameters, Makers, Overrides
from zotune.forward.siblings import siblings_of
from zotune.rng.counter import foresee
from zotune.rng.directions import Directions, Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.flat_buffer import draw_together
from zotune.subspaces.multi_tensor import gather
from zotune.weights import placement
from zotune.weights.placement import is_sharded
from zotune.weights.precision import HALF
from zotune.weights.structure import every_module

T = TypeVar("T")


class Probe:
    """Evaluates functions of a model at points θ + offset.

    Args:
        model: any module.
        coordinates: the coordinates of its trainable parameters (see ``subspaces``).
        directions: the distribution of Z.

    Example:
        >>> from zotune.subspaces import Full
        >>> model = nn.Linear(3, 1)
        >>> probe = Probe(model, [Full().coordinate(n, p) for n, p in model.named_parameters()], Directions("gaussian"))
        >>> plus = probe.evaluate(lambda: model(torch.ones(1, 3)), Offset(1e-3, seed=0, step=0, direction=0))
    """

    def __init__(self, model: nn.Module, coordinates: Sequence[Coordinate], directions: Directions) -> None:
        self.model = model
        self.directions = directions
        self.coordinates = list(coordinates)
        self._low_rank = [c for c in self.coordinates if isinstance(c, LowRankCoordinate)]
        self._neighbors = draw_together(self.coordinates)
        gather(self.coordinates, directions)
        self._names = [c.name for c in self.coordinates]
        self.devices = sorted({c.device for c in self.coordinates}, key=str)
        self._overrides = Overrides(model, self.coordinates)
        self.siblings = siblings_of(model, {id(c.parameter): c for c in self.coordinates})
        #: Whether a parameter, trained or not, is split among processes: all of them then have to evaluate the same points together.
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        #: Whether a parameter is away between forwards (``residence``), so that every forward brings it in again.
        self.streams = any(placement.home(parameter) is not None for parameter in model.parameters())
        self.forward_mode = ForwardMode()
        self.side_paths: list[SidePath] = []
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
        with torch.no_grad(), self.evaluation_mode(), self.at(offset, only=only):
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
        with torch.no_grad(), self.evaluation_mode(), self._lent(makers):
            return self.forward_mode.derivative(function, lambda: isolated_generators(key, self.devices))

    def evaluate_stacked(self, function: Callable[[], T], stack: Stack) -> T:
        """``function()`` on stacked rows, each block of rows at its own point.

        Raises:
            NotBatchableError: the model does something with a parameter that has no batched form.
        """
        with isolated_generators(Key(stack.seed, stack.step, 0, "", "loss"), self.devices):
            return self.evaluate_lent(function, Lending(stack, self.directions, self.siblings))

    def evaluate_lent(self, function: Callable[[], T], lending: Lending) -> T:
        """:meth:`evaluate_stacked` with what is lent given, and the generators as they are."""
        with torch.no_grad(), self.evaluation_mode(), self._stacked(lending):
            return function()

    @contextmanager
    def _stacked(self, lending: Lending) -> Iterator[None]:
        try:
            with self._lent(self._overrides.makers(lend, lending)):
                for coordinate in self._low_rank:
                    coordinate.moved = None  # side paths keep out
                yield
        finally:
            lending.end()

    @property
    def dense(self) -> Coordinate | None:
        """A coordinate of which several directions cannot be evaluated at once, if there is one."""
        return next((c for c in self.coordinates if not c.thin), None)

    @property
    def dense_together(self) -> bool:
        """Whether all points of one direction can be evaluated at once all the same: by a weight for each, formed layer by layer."""
        return all(c.thin or (type(c) is FullCoordinate and len(c.shape) == 2) for c in self.coordinates)

    @contextmanager
    def at(self, offset: Offset | None, *, side_paths: bool = True, only: Collection[str] | None = None) -> Iterator[list[LentParameters]]:
        """Show the model θ + offset for the length of a block.

        ``side_paths=False`` takes the general way everywhere; ``only`` moves no coordinates but the named ones.
        """
        makers: dict[int, Makers] = {}
        room = Room(sum(coordinate.numel for coordinate in self.coordinates))
        if offset is not None:
            for owner in self._overrides.owners:
                for name, coordinate in owner.parameters.items():
                    if only is not None and coordinate.name not in only:
                        continue
                    if not (side_paths and isinstance(coordinate, LowRankCoordinate) and coordinate.side_path):
                        makers.setdefault(id(owner), {})[name] = owner.maker(coordinate, self.directions, offset, room)
                    elif self._forms(coordinate, offset):
                        makers.setdefault(id(owner), {})[name] = materialized.lender(coordinate, self.directions, offset)
        with self._lent(makers) as tables:
            for coordinate in self._low_rank:
                moves = only is None or coordinate.name in only
                if moves and (not side_paths or self._forms(coordinate, offset)):
                    coordinate.moved = None  # the weight that is lent has A in it already
                elif moves and coordinate.side_path:
                    still = offset is None or not coordinate.moves(offset.step, offset.direction)
                    coordinate.shift(self.directions, None if still else offset)
            yield tables

    def _forms(self, coordinate: LowRankCoordinate, offset: Offset | None) -> bool:
        """Whether its layer is lent a weight that it may form, instead of going beside."""
        here = coordinate.side_path and coordinate.name in self._formable
        return here and offset is not None and coordinate.moves(offset.step, offset.direction)

    def instead(self, coordinates: Mapping[str, Any]) -> AbstractContextManager[None]:
        """For the length of a block, evaluate with other objects in place of the coordinates of these names; they need :meth:`at`."""
        return self._overrides.instead(coordinates)

    def _lent(self, makers: Mapping[int, Makers]) -> AbstractContextManager[list[LentParameters]]:
        """Modules read what ``makers`` make; afterwards tables and hooks are as they were."""
        return self._overrides.lent(makers, self._rest)

    def _rest(self) -> None:
        """Hooks add what belongs to θ."""
        for coordinate in self._low_rank:
            coordinate.shift(self.directions, None)

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """The whole model in eval mode; afterwards every module's flag is what it was, also where they differed."""
        training = [module for module in every_module(self.model) if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    # -- side paths ---------------------------------------------------------------------------------------------------------------

    def _attach_side_paths(self) -> None:
        for coordinate in self._low_rank:
            owners = [(o.module, name) for o in self._overrides.owners for name, c in o.parameters.items() if c is coordinate]
            if not all(SidePath.fits(module, name) for module, name in owners):
                coordinate.fold_every_step()
                continue
            try:
                self.side_paths += [SidePath(module, name, coordinate) for module, name in owners]
            except ValueError:
                self.detach()
                raise

    def foresee(self, seed: int, step: int) -> None:
        """While a device is busy: what the directions of ``step`` will need of the host."""
        if len(self.devices) == 1 and self.devices[0].type != "cpu":
            foresee(seed, step, self._names, self.devices[0])
            for neighbors in self._neighbors:
                neighbors.foresee(self.directions, seed, step)

    def forget_directions(self) -> None:
        """Let go of directions that are kept between a step's evaluations and its update."""
        for coordinate in self.coordinates:
            coordinate.drop()

    def distrust(self, names: Sequence[str]) -> None:
        """Give the named coordinates the general way from now on."""
        for path in [p for p in self.side_paths if p.coordinate.name in names]:
            path.remove()
            self.side_paths.remove(path)
        for coordinate in self._low_rank:
            if coordinate.name in names and coordinate.side_path:
                coordinate.fold_every_step()

    def detach(self) -> None:
        """Remove every hook from the model."""
        for path in self.side_paths:
            path.remove()
        self.side_paths.clear()

    def agree(self, quick: Tensor, slow: Tensor, here: Tensor) -> bool:
        """Whether two evaluations of perturbed losses differ by rounding and 5% of what the perturbation changes; ``here``: at θ."""
        half = any(p.dtype in HALF for p in self.model.parameters())  # a float32 adapter on a half-precision model, for one
        return path_check.agree(quick, slow, here, half=half)

    def prepare(self, function: Callable[[], Tensor], offset: Offset) -> list[str]:
        """Compare hooks and general way on one evaluation; the names of coordinates that go the general way from now on.

        Each finding is a warning; see :mod:`zotune.forward.path_check`.
        """
        if not self.side_paths:
            return []
        key = Key(offset.seed, offset.step, 0, "", "loss")

        def evaluate(at: Offset | None, hooks: bool, only: Collection[str] | None) -> tuple[Tensor, list[LentParameters]]:
            with (
                torch.no_grad(),
                self.evaluation_mode(),
                self.at(at, side_paths=hooks, only=only) as tables,
                isolated_generators(key, self.devices),
            ):
                return function().detach().float(), tables

        return path_check.check(evaluate, self.side_paths, offset, self.agree, self.distrust)
