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

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zotune import formed, residence
from zotune.coordinates import Coordinate, Offset
from zotune.counter import foresee
from zotune.directions import Directions, Key, generator_seed
from zotune.fleets import gather
from zotune.forward_mode import ForwardMode, dual
from zotune.io.execution import current
from zotune.lending import Lending
from zotune.neighbours import draw_together
from zotune.precision import HALF
from zotune.side_path import SidePath
from zotune.stacking import Stack
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.full import is_sharded
from zotune.unformed import Room, lender

T = TypeVar("T")


class LentParameters(dict[str, Any]):
    """A module's ``_parameters`` that hands out, on reading, what ``lend`` makes for a name. Iteration shows the originals."""

    def __init__(self, originals: dict[str, Any], lend: dict[str, Callable[[], Tensor]], coordinates: dict[str, Coordinate]) -> None:
        super().__init__(originals)
        self.lend = lend
        self.coordinates = coordinates  # by local name
        self.reads: dict[str, int] = dict.fromkeys(lend, 0)

    def __getitem__(self, name: str) -> Any:
        make = self.lend.get(name)
        if make is None:
            return super().__getitem__(name)
        self.reads[name] += 1
        return make()


class _Owner:
    """A module and those of its own parameters that are coordinates."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters: dict[str, Coordinate] = {}

    def table(self, lend: dict[str, Callable[[], Tensor]]) -> LentParameters:
        return LentParameters(self.module._parameters, lend, self.parameters)


def every_module(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, each once and in whatever order: without its nested generators, which a step would notice."""
    found = {id(model): model}
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


@contextmanager
def isolated_generators(key: Key, devices: Sequence[torch.device]) -> Iterator[None]:
    """Seed torch's global generators from ``key`` for the length of a block, and put their states back after it.

    A loss with randomness of its own sees the same numbers at every evaluation of a step (common random numbers), new ones each step,
    and the same ones again after a resume; the program around it notices nothing.
    """
    if not current().isolates_generators:
        yield
        return
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[d.index or 0] for d in devices if d.type == "cuda"]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(generator_seed(key))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


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
        self._neighbours = draw_together(self.coordinates)
        gather(self.coordinates, directions)
        self._names = [c.name for c in self.coordinates]
        self.devices = sorted({c.device for c in self.coordinates}, key=str)
        by_parameter = {id(c.parameter): c for c in self.coordinates}
        owners: dict[int, _Owner] = {}
        for module in model.modules():
            for local_name, parameter in module._parameters.items():
                coordinate = by_parameter.get(id(parameter))
                if coordinate is not None:
                    owners.setdefault(id(module), _Owner(module)).parameters[local_name] = coordinate
        self._owners = list(owners.values())
        self.siblings = _siblings(model, by_parameter)
        #: Whether a parameter, trained or not, is split among processes: all of them then have to evaluate the same points together.
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        #: Whether a parameter is away between forwards (``residence``), so that every forward brings it in again.
        self.streams = any(residence.home(parameter) is not None for parameter in model.parameters())
        self._gathering: list[Any] = [module for module in model.modules() if hasattr(module, "unshard") and hasattr(module, "reshard")]
        for module in self._gathering[:1]:
            module._get_fsdp_state()._lazy_init()  # looks at the parameters, and would find those that are lent
        self.forward_mode = ForwardMode()
        self.side_paths: list[SidePath] = []
        self._attach_side_paths()
        owned = Counter(id(c) for owner in self._owners for c in owner.parameters.values())
        #: Names of weights that one linear layer alone is lent, on a device where it may form them (``formed``).
        self._formable = {
            c.name
            for owner in self._owners
            for c in owner.parameters.values()
            if type(owner.module).forward is nn.Linear.forward
            and isinstance(c, LowRankCoordinate)
            and not c.transposed
            and owned[id(c)] == 1
            and not self.sharded
            and formed.kernel_of(c) is not None
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
        lend: dict[int, dict[str, Callable[[], Tensor]]] = {
            id(o): {name: partial(dual, c, self.directions, offset) for name, c in o.parameters.items()} for o in self._owners
        }
        key = Key(offset.seed, offset.step, 0, "", "loss")
        with torch.no_grad(), self.evaluation_mode(), self._lent(lend):
            return self.forward_mode.derivative(function, lambda: isolated_generators(key, self.devices))

    def evaluate_stacked(self, function: Callable[[], T], stack: Stack) -> T:
        """``function()`` on stacked rows, each block of rows at its own point.

        Raises:
            NotStackable: the model does something with a parameter that has no batched form.
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
            with self._lent({id(o): {name: partial(lending.lend, c) for name, c in o.parameters.items()} for o in self._owners}):
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
        lend: dict[int, dict[str, Callable[[], Tensor]]] = {}
        room = Room(sum(coordinate.numel for coordinate in self.coordinates))
        if offset is not None:
            for owner in self._owners:
                for name, coordinate in owner.parameters.items():
                    if only is not None and coordinate.name not in only:
                        continue
                    if not (side_paths and isinstance(coordinate, LowRankCoordinate) and coordinate.side_path):
                        lend.setdefault(id(owner), {})[name] = lender(owner.module, coordinate, self.directions, offset, room)
                    elif self._forms(coordinate, offset):
                        lend.setdefault(id(owner), {})[name] = formed.lender(coordinate, self.directions, offset)
        with self._lent(lend) as tables:
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

    @contextmanager
    def instead(self, coordinates: Mapping[str, Any]) -> Iterator[None]:
        """For the length of a block, evaluate with other objects in place of the coordinates of these names; they need :meth:`at`."""
        originals = [dict(owner.parameters) for owner in self._owners]
        try:
            for owner in self._owners:
                owner.parameters = {local: coordinates.get(c.name, c) for local, c in owner.parameters.items()}
            yield
        finally:
            for owner, parameters in zip(self._owners, originals, strict=True):
                owner.parameters = parameters

    @contextmanager
    def _lent(self, lend: dict[int, dict[str, Callable[[], Tensor]]]) -> Iterator[list[LentParameters]]:
        """Lend parameters, by id of their owner and local name; afterwards tables and side paths are as they were."""
        lent: list[tuple[nn.Module, dict[str, Any]]] = []
        flat: list[tuple[nn.Module, list[Any]]] = []
        tables = []
        try:
            for owner in self._owners:
                makers = lend.get(id(owner))
                if not makers:
                    continue
                module = owner.module
                table = owner.table(makers)
                tables.append(table)
                lent.append((module, module._parameters))
                module.__dict__["_parameters"] = table
                if isinstance(module, nn.RNNBase):  # recurrent kernels take their weights from a list of their own
                    flat.append((module, module._flat_weights))
                    module.__dict__["_flat_weights"] = [getattr(module, name) for name in module._flat_weights_names]
            yield tables
        finally:
            for coordinate in self._low_rank:
                coordinate.shift(self.directions, None)
            for module in self._gathering:  # FSDP2: what it has put in a table goes while the table is there
                module.reshard()
            for module, weights in flat:
                module.__dict__["_flat_weights"] = weights
            for module, parameters in lent:
                module.__dict__["_parameters"] = parameters

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
            owners = [(o.module, name) for o in self._owners for name, c in o.parameters.items() if c is coordinate]
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
            for neighbours in self._neighbours:
                neighbours.foresee(self.directions, seed, step)

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
        rounding = (2e-2 if half else 1e-5) * (1 + here.abs().max())
        return not bool(torch.isfinite(slow).all()) or bool((quick - slow).abs().max() <= rounding + 0.05 * (slow - here).abs().max())

    def prepare(self, function: Callable[[], Tensor], offset: Offset) -> list[str]:
        """Compare side paths and general way on one evaluation; the names of coordinates that go the general way from now on.

        A weight that is read more often than its layer's forward runs is looked at by somebody else, for its dtype perhaps, or to
        compute with it (a parent that reaches in); such weights are compared by themselves first. Then all together: the losses may
        differ by rounding and 5% of what the perturbation changes. Each finding is a warning.
        """
        if not self.side_paths:
            return []

        def run(at: Offset | None, side_paths: bool, only: Collection[str] | None = None) -> tuple[Tensor, list[LentParameters]]:
            key = Key(offset.seed, offset.step, 0, "", "loss")
            with (
                torch.no_grad(),
                self.evaluation_mode(),
                self.at(at, side_paths=side_paths, only=only) as tables,
                isolated_generators(key, self.devices),
            ):
                return function().detach().float(), tables

        here, _ = run(None, True)

        def agree(quick: Tensor, slow: Tensor) -> bool:
            return self.agree(quick, slow, here)

        for path in self.side_paths:
            path.fired = 0
        quick, _ = run(offset, True)
        fired = Counter[str]()
        for path in self.side_paths:
            fired[path.coordinate.name] += path.fired
        slow, tables = run(offset, False)
        reads = Counter[str]()
        for table in tables:
            reads.update({table.coordinates[local_name].name: count for local_name, count in table.reads.items()})
        reached_into = sorted(name for name in fired if reads[name] > fired[name])
        # Alone, and with a move as large as a weight, what the side path misses is all the difference there is.
        far = dataclasses.replace(offset, scale=max(offset.scale, 2e-2))
        reached_into = [n for n in reached_into if not agree(run(far, True, {n})[0], run(far, False, {n})[0])]
        if reached_into:
            warnings.warn(
                f"{', '.join(reached_into)}: read from outside the layer's own forward, so its low-rank update is folded every step "
                "instead of riding beside it; results are the same, steps are slower.",
                stacklevel=3,
            )
            self.distrust(reached_into)
            quick, _ = run(offset, True)
        if agree(quick, slow):
            return reached_into
        names = sorted({path.coordinate.name for path in self.side_paths})
        warnings.warn(
            f"the fast and the general evaluation of this model disagree ({quick.mean():.6g} against {slow.mean():.6g}); taking the "
            "general one for every layer: results are right, steps are slower.",
            stacklevel=3,
        )
        self.distrust(names)
        return sorted({*reached_into, *names})


#: Projections of one attention or gated layer, and no list of layers that have nothing else in common.
_MOST_SIBLINGS = 4


def _siblings(model: nn.Module, by_parameter: Mapping[int, Coordinate]) -> dict[str, tuple[LowRankCoordinate, ...]]:
    """By name of their weight: linear layers of one parent with inputs of one width, which may turn out to be the same input."""
    found: dict[str, tuple[LowRankCoordinate, ...]] = {}
    for parent in model.modules():
        alike: dict[int, list[LowRankCoordinate]] = {}
        for child in parent.children():
            coordinate = by_parameter.get(id(child.weight)) if isinstance(child, nn.Linear) else None
            if (
                isinstance(coordinate, LowRankCoordinate)
                and not coordinate.transposed
                and coordinate not in alike.get(coordinate.parameter.shape[1], ())
            ):
                alike.setdefault(coordinate.parameter.shape[1], []).append(coordinate)
        for group in alike.values():
            if 1 < len(group) <= _MOST_SIBLINGS:
                found.update({coordinate.name: tuple(group) for coordinate in group})
    return found
