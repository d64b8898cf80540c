"""Multi-tensor updates: plain SGD on many large weights in full space by one kernel launch on an accelerator.

Directions depend on a weight's own key, so no result depends on the other members. Rules with state, offloaded weights and weights with a
block schedule are updated one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zotune.kernels import perturb_kernels
from zotune.rng.directions import Directions, Key
from zotune.subspaces.coordinate import Coordinate
from zotune.subspaces.full import rounding_key
from zotune.weights import placement

#: Alignment of a weight's memory, in bytes.
ALIGNED = 16


class MultiTensorGroup:
    """Weights in full space of one dtype on one device."""

    def __init__(self, members: Sequence[Coordinate]) -> None:
        self.members = list(members)
        self.names = [c.name for c in members]
        self.lr_scale = members[0].lr_scale
        self.rounds = members[0].rounds
        self._many: Any = None
        for coordinate in members:
            coordinate.multi_tensor = self

    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k for all members, bit for bit like each member's own."""
        taken = [(direction, weight) for direction, weight in enumerate(weights) if weight]
        if not taken:
            if keep != 1.0:
                for coordinate in self.members:
                    coordinate.descend(directions, weights, keep, seed, step)
            return
        anchored = keep != 1.0 and any(c.anchored for c in self.members)
        if anchored or (self.rounds and len(taken) > 1):  # a kernel knows no anchor, and rounds after every direction
            for coordinate in self.members:
                coordinate.descend(directions, weights, keep, seed, step)
            return
        stored = [c.parameter.data.view(-1) for c in self.members]
        residuals = None if self.rounds or stored[0].element_size() == 4 else [c.residual_tensor() for c in self.members]
        kernel = perturb_kernels(stored[0])
        if self._many is None or self._many.places != kernel.MultiTensorUpdate.places_of(stored, residuals):
            self._many = kernel.MultiTensorUpdate(stored, residuals)
        roundings = [rounding_key(seed, step, name) for name in self.names]
        for place, (direction, weight) in enumerate(taken):
            keys = [Key(seed, step, direction, name) for name in self.names]
            self._many.update(directions, keys, roundings, weight, 1.0 if place else keep)

    def drop(self) -> None:
        """Nothing is cached between a step's evaluations and its update."""


def build_multi_tensor_groups(coordinates: Sequence[Coordinate], directions: Directions) -> list[MultiTensorGroup]:
    """Groups of the coordinates among these that can be updated together, by device, dtype and learning-rate scale."""
    kinds: dict[Any, list[Coordinate]] = {}
    for coordinate in coordinates:
        weight = coordinate.parameter.data
        fits = (
            coordinate.supports_multi_tensor
            and coordinate.schedule is None
            and directions.dense
            and directions.kind != "sphere"  # a scale of its own for every weight
            and placement.offload_handle(coordinate.parameter) is None
            and weight.is_contiguous()
            and weight.data_ptr() % ALIGNED == 0
            and perturb_kernels(weight) is not None
        )
        if fits:
            kinds.setdefault((coordinate.device, weight.dtype, coordinate.lr_scale, coordinate.rounds), []).append(coordinate)
    return [MultiTensorGroup(members) for members in kinds.values() if len(members) > 1]
