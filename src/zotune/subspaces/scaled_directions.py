"""Full space with elementwise scaled directions s ⊙ Z."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.full import FullCoordinate

#: The factors (or a mask) of a block of elements, flat.
Factors = Callable[[slice], Tensor]


class ScaledDirections(Directions):
    """Other directions times ``factors``, elementwise; for one parameter."""

    dense = False

    def __init__(self, inner: Directions, factors: Factors) -> None:
        super().__init__(inner.kind if inner.kind in self.KINDS else "gaussian")
        self.inner, self.factors = inner, factors

    def scale(self, key: Key, numel: int, device: torch.device) -> float:
        return self.inner.scale(key, numel, device)

    @tagged("directions")
    def block(self, key: Key, part: slice, device: torch.device, scale: float = 1.0) -> Tensor:
        return self.inner.block(key, part, device, scale).mul_(self.factors(part))

    @tagged("directions")
    def rows(self, key: Key, rows: Tensor, columns: int) -> Tensor:
        found = self.inner.rows(key, rows, columns)
        for place, row in enumerate(rows.tolist()):
            found[place].mul_(self.factors(slice(row * columns, (row + 1) * columns)))
        return found

    @tagged("directions")
    def draw_many(self, key: Key, count: int, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        z = self.inner.draw_many(key, count, shape, device)
        return z.mul_(self.factors(slice(0, z[0].numel())).view(shape))


class TransformedCoordinate(FullCoordinate, abc.ABC):
    """θ = W with directions of its own, made from the method's by :meth:`transformed`."""

    draws_separately = True
    #: Whether :meth:`learn` comes before a step's update of W.
    renew_first = False

    def learn(self, directions: Directions, coefficients: Sequence[float], curvatures: Sequence[float], seed: int, step: int) -> None:
        """Renew what the directions are made of by a step's coefficients c_k and curvatures q_k."""

    @abc.abstractmethod
    def transformed(self, directions: Directions, seed: int, step: int) -> Directions:
        """The directions of evaluations in a step."""

    def updating(self, directions: Directions, seed: int, step: int) -> Directions:
        """The same for the step's update, which changes W."""
        return self.transformed(directions, seed, step)

    def draw(self, directions: Directions, seed: int, step: int, first: int, count: int, alone: bool = False) -> Tensor:
        return super().draw(self.transformed(directions, seed, step), seed, step, first, count, alone)

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        return super().at(directions if offset is None else self.transformed(directions, offset.seed, offset.step), offset)

    def at_in(self, out: Tensor, directions: Directions, offset: Offset) -> Tensor:
        return super().at_in(out, self.transformed(directions, offset.seed, offset.step), offset)

    def strips_at(self, directions: Directions, offset: Offset, height: int) -> Iterator[tuple[slice, Tensor]]:
        return super().strips_at(self.transformed(directions, offset.seed, offset.step), offset, height)

    def rows_at(self, directions: Directions, offset: Offset, rows: Tensor) -> Tensor:
        return super().rows_at(self.transformed(directions, offset.seed, offset.step), offset, rows)

    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        return super().weighted(self.transformed(directions, seed, step), weights, seed, step)

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        super().descend(self.updating(directions, seed, step), weights, keep, seed, step)


class ScaledCoordinate(TransformedCoordinate):
    """θ = W with directions s ⊙ Z, s the :meth:`factors` of the step, the same for evaluations and the update."""

    @abc.abstractmethod
    def factors(self, seed: int, step: int) -> Factors:
        """The factors of a step, until W changes."""

    def fixed_factors(self, seed: int, step: int) -> Factors:
        """The factors of a step as they are now, even when W changes."""
        return self.factors(seed, step)

    def transformed(self, directions: Directions, seed: int, step: int) -> Directions:
        return directions if isinstance(directions, ScaledDirections) else ScaledDirections(directions, self.factors(seed, step))

    def updating(self, directions: Directions, seed: int, step: int) -> Directions:
        return ScaledDirections(directions, self.fixed_factors(seed, step))
