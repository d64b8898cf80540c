"""Overrides: for the length of an evaluation, modules read other parameters than they store.

A module's parameter table is replaced by one that makes a parameter when ``module.weight`` is read and keeps no reference to it. It does
not matter whether the module reads it in its own forward or a parent does (``nn.MultiheadAttention``). Stored tensors are only read, and
the tables are restored whatever a forward raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from zotune.forward.layers import LayerRule, rule_of
from zotune.forward.lazy_weight import LazyWeight, WeightBuffer, whole
from zotune.rng.directions import Directions
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.weights.placement import is_sharded

#: Functions that make the parameters of one module, by local name.
Factories = dict[str, Callable[[], Tensor]]


class OverriddenParameters(dict[str, Any]):
    """A module's ``_parameters`` in which reading a name calls its factory. Iteration shows the originals."""

    def __init__(self, originals: dict[str, Any], factories: Factories, coordinates: dict[str, Coordinate]) -> None:
        super().__init__(originals)
        self.factories = factories
        self.coordinates = coordinates  # by local name
        self.reads: dict[str, int] = dict.fromkeys(factories, 0)
        self.kept: dict[str, Any] | None = None  # None: parameters are made anew at each read

    def keep(self, kept: bool) -> None:
        """Whether a parameter is made, whole, at its first read only."""
        self.kept = {} if kept else None

    def __getitem__(self, name: str) -> Any:
        make = self.factories.get(name)
        if make is None:
            return super().__getitem__(name)
        self.reads[name] += 1
        if self.kept is None:
            return make()
        if name not in self.kept:
            self.kept[name] = whole(make())
        return self.kept[name]


class Owner:
    """A module that owns trained parameters.

    Attributes:
        module: the module.
        rule: of its layer type, None without one.
        parameters: the coordinates of its own parameters, by local name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rule: LayerRule | None = rule_of(module)
        self.parameters: dict[str, Coordinate] = {}

    def factory(self, coordinate: Coordinate, directions: Directions, offset: Offset, buffer: WeightBuffer) -> Callable[[], Tensor]:
        """A function that makes a parameter at θ + offset on the general path: whole, or lazy if the layer type supports it."""
        if not coordinate.is_active(offset.step, offset.direction):
            return partial(coordinate.at, directions, None)
        if isinstance(coordinate, FullCoordinate | LowRankCoordinate) and self._is_lazy(coordinate, buffer):
            return partial(LazyWeight.of, coordinate, directions, offset, buffer)
        return partial(coordinate.at, directions, offset)

    def _is_lazy(self, coordinate: FullCoordinate | LowRankCoordinate, buffer: WeightBuffer) -> bool:
        if self.rule is None:
            return False
        if isinstance(coordinate, LowRankCoordinate):
            return self.rule.is_lazy_low_rank(self.module, coordinate) and not is_sharded(coordinate.parameter)
        matrix = len(coordinate.shape) == 2 and not (coordinate.thin or coordinate.sharded)
        return matrix and self.rule.is_lazy_in_full(self.module, coordinate, buffer)


class Overrides:
    """The modules that own a model's trained parameters, and the replacement of their parameter tables.

    Args:
        model: any module.
        coordinates: of its trainable parameters.
    """

    def __init__(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> None:
        by_parameter = {id(c.parameter): c for c in coordinates}
        owners: dict[int, Owner] = {}
        for module in model.modules():
            for local_name, parameter in module._parameters.items():
                coordinate = by_parameter.get(id(parameter))
                if coordinate is not None:
                    owners.setdefault(id(module), Owner(module)).parameters[local_name] = coordinate
        self.owners = list(owners.values())
        self._fsdp: list[Any] = [module for module in model.modules() if hasattr(module, "unshard") and hasattr(module, "reshard")]
        for module in self._fsdp[:1]:
            module._get_fsdp_state()._lazy_init()  # reads the parameters, so it must not run while they are overridden

    def factories(self, make: Callable[..., Tensor], *rest: Any) -> dict[int, Factories]:
        """Factories ``make(coordinate, *rest)`` of all parameters, by id of the owner and local name."""
        return {id(owner): {name: partial(make, c, *rest) for name, c in owner.parameters.items()} for owner in self.owners}

    @contextmanager
    def active(self, factories: Mapping[int, Factories], finish: Callable[[], object]) -> Iterator[list[OverriddenParameters]]:
        """For the length of a block, modules read what ``factories`` make; then ``finish()`` is called and the tables are restored.

        Args:
            factories: by id of the owner.
            finish: called before the tables are restored, whatever was raised.
        """
        replaced: list[tuple[nn.Module, dict[str, Any]]] = []
        flat: list[tuple[nn.Module, list[Any]]] = []
        tables = []
        try:
            for owner in self.owners:
                makers = factories.get(id(owner))
                if not makers:
                    continue
                module = owner.module
                table = OverriddenParameters(module._parameters, makers, owner.parameters)
                tables.append(table)
                replaced.append((module, module._parameters))
                module.__dict__["_parameters"] = table
                if isinstance(module, nn.RNNBase):  # recurrent kernels read their weights from a separate list
                    flat.append((module, module._flat_weights))
                    module.__dict__["_flat_weights"] = [getattr(module, name) for name in module._flat_weights_names]
            yield tables
        finally:
            finish()
            for module in self._fsdp:  # unsharded parameters are removed from the tables they were put into
                module.reshard()
            for module, weights in flat:
                module.__dict__["_flat_weights"] = weights
            for module, parameters in replaced:
                module.__dict__["_parameters"] = parameters

    @contextmanager
    def replace_coordinates(self, coordinates: Mapping[str, Any]) -> Iterator[None]:
        """For the length of a block, other objects replace the coordinates of these names."""
        originals = [dict(owner.parameters) for owner in self.owners]
        try:
            for owner in self.owners:
                owner.parameters = {local: coordinates.get(c.name, c) for local, c in owner.parameters.items()}
            yield
        finally:
            for owner, parameters in zip(self.owners, originals, strict=True):
                owner.parameters = parameters
