"""What a subspace is: a small configuration that makes the coordinates of a model's trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from zotune.subspaces.coordinate import Coordinate


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

    def needs_data(self, step: int) -> bool:
        """Whether the subspace looks at the data of a step before it begins."""
        ...

    def sample_size(self, step: int) -> int:
        """At how many examples it wants to look then, where more than the step's are to be had; 0: at the step's."""
        ...

    def observe(
        self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Callable[..., Iterator[Tensor]], seed: int, step: int
    ) -> dict[str, Tensor]:
        """What is to be known of the data, by name of the coordinate.

        Args:
            losses: evaluates the losses of the step's micro-batches at θ, one after the other, as the loss function returns them;
                ``losses(offset, moved)`` at θ + offset along coordinates ``moved``, by name, in place of those of the same names.
        """
        ...

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        """(numbers in θ, float32 numbers kept beside the weights) for a parameter of this shape."""
        ...

    def memory(self, update_rule_state: float) -> str:
        """What is kept between steps beyond the weights, for people, if the rule keeps so many numbers a coordinate."""
        ...


class Space:
    """A subspace whose coordinates are the weights and know nothing of each other."""

    full = True

    def attach(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> int:
        return 1

    def needs_data(self, step: int) -> bool:
        return False

    def sample_size(self, step: int) -> int:
        return 0

    def observe(
        self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Callable[..., Iterator[Tensor]], seed: int, step: int
    ) -> dict[str, Tensor]:
        return {}

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        return math.prod(shape), 0

    def memory(self, update_rule_state: float) -> str:
        return f"{update_rule_state:g} × W" if update_rule_state else "none"
