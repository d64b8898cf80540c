"""Full space of every parameter, stored whole or sharded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zotune.subspaces.base import Subspace
from zotune.subspaces.coordinate import Coordinate
from zotune.subspaces.full import FullCoordinate
from zotune.subspaces.sharded import ShardedCoordinate
from zotune.weights.placement import is_sharded


@dataclass(frozen=True)
class Full(Subspace):
    """Every trainable parameter is trained in its own full space."""

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        return full_coordinate(name, parameter)


def full_coordinate(name: str, parameter: nn.Parameter, *, keep_residual: bool | None = None) -> FullCoordinate:
    """The full-space coordinates of a parameter, whole or sharded; ``keep_residual`` as there."""
    kind = ShardedCoordinate if is_sharded(parameter) else FullCoordinate
    return kind(name, parameter, keep_residual=keep_residual)
