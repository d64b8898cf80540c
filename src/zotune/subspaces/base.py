"""The interface of a subspace: a small configuration that makes the coordinates of a model's trainable parameters."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from zotune.subspaces.coordinate import Coordinate

#: ``losses()`` evaluates the losses of the step's micro-batches at θ, one after the other, as the loss function returns them;
#: ``losses(offset, others)`` at θ + offset along the coordinates ``others``, by name, in place of those of the same names.
Losses = Callable[..., Iterator[Tensor]]


class Subspace(abc.ABC):
    """Which coordinates of a model are trained. By default they are weights, independent of each other and of data.

    Attributes:
        full: whether the coordinates are weights, all or some of them.
        quantized: whether only quantized weights are trained, by writing them.
    """

    full = True
    quantized = False

    @abc.abstractmethod
    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        """The coordinates of one parameter."""

    def attach(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> int:
        """Set what the coordinates of a whole model share; returns the number of parts with directions of their own."""
        return 1

    def needs_data(self, step: int) -> bool:
        """Whether :meth:`observe` is due before a step."""
        return False

    def sample_size(self, step: int) -> int:
        """Examples for :meth:`observe`, where more than the step's are available; 0: the step's."""
        return 0

    def observe(self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Losses, seed: int, step: int) -> dict[str, Tensor]:
        """What the next redraw takes from data, by name of the coordinate."""
        return {}

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        """(elements of θ, float32 elements kept beside the weights) for a parameter of this shape."""
        return math.prod(shape), 0

    def memory(self, update_rule_state: float) -> str:
        """A formula of what is kept between steps beyond the weights, if the rule keeps so many elements a coordinate."""
        return f"{update_rule_state:g} × W" if update_rule_state else "none"


def at_least_one(field: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} must be a whole number of at least 1, not {value!r}.")


def positive(field: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a finite number above 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{field} must be a positive number, not {value!r}.")


def not_negative(field: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a finite number of at least 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{field} must be a number of at least 0, not {value!r}.")


def check_density(density: object) -> None:
    """Raises ValueError unless ``density`` lies in (0, 1]."""
    if not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(f"density must lie in (0, 1], not {density!r}.")
