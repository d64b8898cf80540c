"""What a subspace is: a small configuration that makes the coordinates of a model's trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from zotune.coordinates import Coordinate


class Subspace(Protocol):
    """Which coordinates of a model move.

    Attributes:
        full: whether the coordinates are the weights themselves, all or some of them.
    """

    @property
    def full(self) -> bool: ...

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        """The coordinates of one parameter."""
        ...

    def attach(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> int:
        """Tell the coordinates of a whole model what they need to know of each other; how many parts have directions of their own."""
        ...

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        """(numbers in θ, float32 numbers kept beside the weights) for a parameter of this shape."""
        ...

    def memory(self, rule_state: float) -> str:
        """What is kept between steps beyond the weights, for people, if the rule keeps so many numbers a coordinate."""
        ...


class Space:
    """A subspace whose coordinates are the weights and know nothing of each other."""

    full = True

    def attach(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> int:
        return 1

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        return math.prod(shape), 0

    def memory(self, rule_state: float) -> str:
        return f"{rule_state:g} × W" if rule_state else "none"
