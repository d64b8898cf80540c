"""Overrides: for the length of an evaluation, modules read other parameters than they store.

A module's parameter table is exchanged for one that makes a parameter at the moment somebody reads ``module.weight``, and nothing keeps it
longer than that somebody does. It does not matter whether the module reads it in its own forward or a parent reaches in
(``nn.MultiheadAttention`` does). The stored tensors are only read: whatever is raised inside a forward, the tables are back in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from zotune.forward.layers import LayerRule, rule_of
from zotune.forward.lazy_weight import LazyWeight, Room
from zotune.rng.directions import Directions
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.weights.placement import is_sharded

#: What makes the parameters of one owner, by their local names.
Makers = dict[str, Callable[[], Tensor]]


class OverriddenParameters(dict[str, Any]):
    """A module's ``_parameters`` that hands out, on reading, what ``lend`` makes for a name. Iteration shows the originals."""

    def __init__(self, originals: dict[str, Any], lend: Makers, coordinates: dict[str, Coordinate]) -> None:
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


class Owner:
    """A module and those of its own parameters that are coordinates.

    Attributes:
        module: the module.
        rule: of its layer type, None if it is of none.
        parameters: its coordinates, by local name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rule: LayerRule | None = rule_of(module)
        self.parameters: dict[str, Coordinate] = {}

    def table(self, lend: Makers) -> OverriddenParameters:
        """What stands in for the module's parameter table."""
        return OverriddenParameters(self.module._parameters, lend, self.parameters)

    def maker(self, coordinate: Coordinate, directions: Directions, offset: Offset, room: Room) -> Callable[[], Tensor]:
        """What makes a parameter of the module at θ + offset, in the general way: whole, or lazy where the layer type knows how."""
        if not coordinate.is_active(offset.step, offset.direction):
            return partial(coordinate.at, directions, None)
        rule, module = self.rule, self.module
        if isinstance(coordinate, FullCoordinate):
            matrix = len(coordinate.shape) == 2 and not (coordinate.thin or coordinate.sharded)
            if matrix and rule is not None and rule.is_lazy_in_full(module, coordinate, room):
                return partial(LazyWeight.of, coordinate, directions, offset, room)
        elif isinstance(coordinate, LowRankCoordinate):
            whole = is_sharded(coordinate.parameter) or rule is None or not rule.is_lazy_low_rank(module, coordinate)
            return partial(coordinate.at, directions, offset) if whole else partial(LazyWeight.of, coordinate, directions, offset, room)
        return partial(coordinate.at, directions, offset)


class Overrides:
    """The owners of a model's coordinates, and the exchange of their parameter tables.

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
        self._gathering: list[Any] = [module for module in model.modules() if hasattr(module, "unshard") and hasattr(module, "reshard")]
        for module in self._gathering[:1]:
            module._get_fsdp_state()._lazy_init()  # looks at the parameters, and would find those that are lent

    def makers(self, make: Callable[..., Tensor], *rest: Any) -> dict[int, Makers]:
        """What makes every parameter, ``make(coordinate, *rest)``, by id of its owner and local name."""
        return {id(owner): {name: partial(make, c, *rest) for name, c in owner.parameters.items()} for owner in self.owners}

    @contextmanager
    def lent(self, lend: Mapping[int, Makers], finish: Callable[[], object]) -> Iterator[list[OverriddenParameters]]:
        """For the length of a block, modules read what ``lend`` makes; then ``finish()`` is called, and the tables are as they were.

        Args:
            lend: by id of an owner.
            finish: called before the tables are put back, whatever was raised.
        """
        lent: list[tuple[nn.Module, dict[str, Any]]] = []
        flat: list[tuple[nn.Module, list[Any]]] = []
        tables = []
        try:
            for owner in self.owners:
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
            finish()
            for module in self._gathering:  # FSDP2: what it has put in a table goes while the table is there
                module.reshard()
            for module, weights in flat:
                module.__dict__["_flat_weights"] = weights
            for module, parameters in lent:
                module.__dict__["_parameters"] = parameters

    @contextmanager
    def replace_coordinates(self, coordinates: Mapping[str, Any]) -> Iterator[None]:
        """For the length of a block, other objects stand in place of the coordinates of these names."""
        originals = [dict(owner.parameters) for owner in self.owners]
        try:
            for owner in self.owners:
                owner.parameters = {local: coordinates.get(c.name, c) for local, c in owner.parameters.items()}
            yield
        finally:
            for owner, parameters in zip(self.owners, originals, strict=True):
                owner.parameters = parameters
