"""Fleets: large weights in full space on an accelerator, updated by one launch where each would take one.

Numbers belong to a weight's own key, so nothing depends on who the others are. A fleet takes steps of plain SGD; whoever needs more than
that (a rule with state, weights that come and go, weights that move in turns) updates them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zotune.kernels import moves_for
from zotune.rng.directions import Directions
from zotune.subspaces.coordinate import Coordinate
from zotune.weights import placement

#: What a weight's memory has to begin at a multiple of.
ALIGNED = 16


class Fleet:
    """Weights in full space of one dtype on one device.

    Attributes:
        members: the coordinates.
    """

    def __init__(self, members: Sequence[Coordinate]) -> None:
        self.members = list(members)
        self.names = [c.name for c in members]
        self.lr_scale = members[0].lr_scale
        self._many: Any = None
        for coordinate in members:
            coordinate.fleet = self

    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k for all members, bit for bit as each would alone."""
        taken = [(direction, weight) for direction, weight in enumerate(weights) if weight]
        if not taken:
            if keep != 1.0:
                for coordinate in self.members:
                    coordinate.descend(directions, weights, keep, seed, step)
            return
        stored = [c.parameter.data.view(-1) for c in self.members]
        residuals = [c.store_residual() for c in self.members] if stored[0].element_size() == 2 else None
        kernel = moves_for(stored[0], None if residuals is None else residuals[0])
        if self._many is None or self._many.places != kernel.Many.places_of(stored, residuals):
            self._many = kernel.Many(stored, residuals)
        for place, (direction, weight) in enumerate(taken):
            self._many.update(directions, seed, step, direction, self.names, weight, 1.0 if place else keep)

    def drop(self) -> None:
        """Nothing is kept between a step's evaluations and its update."""


def gather(coordinates: Sequence[Coordinate], directions: Directions) -> list[Fleet]:
    """The coordinates among these that can be updated together, those of a kind in a fleet."""
    kinds: dict[Any, list[Coordinate]] = {}
    for coordinate in coordinates:
        weight = coordinate.parameter.data
        residual = getattr(coordinate, "residual", None)
        fits = (
            coordinate.fleets
            and coordinate.turn is None
            and directions.dense
            and directions.kind != "sphere"  # a scale of its own for every weight
            and placement.home(coordinate.parameter) is None
            and weight.is_contiguous()
            and weight.data_ptr() % ALIGNED == 0
            and moves_for(weight, residual) is not None
        )
        if fits:
            kinds.setdefault((coordinate.device, weight.dtype, coordinate.lr_scale), []).append(coordinate)
    return [Fleet(members) for members in kinds.values() if len(members) > 1]
