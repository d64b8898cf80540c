"""Coordinates: what of one parameter moves, and the points θ + offset at which it is evaluated.

The base class of the coordinates that the subspaces of ``subspaces`` make; what they have in common is how their directions are drawn,
kept between an evaluation and the update, and summed.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import GROUP, Directions, Key, add_weighted, group_of


@dataclass(frozen=True)
class Offset:
    """A point to evaluate at: θ + scale · Z, with Z direction number ``direction`` of step ``step`` of run ``seed``."""

    scale: float
    seed: int
    step: int
    direction: int

    def key(self, name: str) -> Key:
        return Key(self.seed, self.step, self.direction, name)


#: How a first moment of θ, linear in its estimates, follows θ to another basis.
Carry = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Turn:
    """When a coordinate of block ``block`` of ``blocks`` moves: in every blocks-th step, or along every blocks-th direction."""

    block: int
    blocks: int
    by_direction: bool

    def comes(self, step: int, direction: int) -> bool:
        return (direction if self.by_direction else step) % self.blocks == self.block


class Joint(Protocol):
    """Coordinates that can be updated as one.

    Attributes:
        members: all of them.
        lr_scale: multiplies the learning rate of each.
    """

    members: list[Coordinate]
    lr_scale: float

    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k for all members, bit for bit as each would alone."""
        ...

    def drop(self) -> None:
        """Forget the directions that are kept between a step's evaluations and its update."""
        ...


class FlatBuffer(Joint, Protocol):
    """Small coordinates side by side in one flat vector of ``total`` elements, as their members and an evaluation see it.

    Attributes:
        stored: whether θ of all members can be read and written there.
        places: where in the flat vector each member lies, by name.
        runs: the places of consecutive members; ``run_of`` by name; ``members_of`` a run.
    """

    stored: bool
    places: dict[str, slice]
    runs: list[slice]
    run_of: dict[str, int]
    members_of: list[list[Coordinate]]

    def many(self, directions: Directions, seed: int, step: int, first: int, count: int) -> Tensor:
        """Directions ``first`` to ``first + count - 1`` of all members, float32, (count, total)."""
        ...

    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        """Σ_k weights[k] · Z_k of all members, float32, (total,); not to be changed."""
        ...

    def values(self) -> Tensor:
        """θ of all members, (total,); not to be changed."""
        ...

    def holds(self, name: str) -> bool:
        """Whether directions are kept that ``name`` may still ask for."""
        ...

    def done(self, name: str) -> None:
        """``name`` needs the directions no longer."""
        ...


#: A matrix in full space with a side of at most this many is small enough to keep several directions of it at a time: an adapter's.
THIN = 64


class Coordinate(abc.ABC):
    """The coordinates of one parameter. ``shape`` is the shape of their direction Z, ``lr_scale`` multiplies the learning rate.

    ``thin`` says that several directions Z may be alive together: low-rank coordinates, vectors, and matrices with a short side. The
    directions of a thin coordinate that an evaluation drew are kept until the update (:meth:`drop` forgets them).
    """

    thin = True
    #: Whether its directions are drawn by calls of their own, never together with those of other small coordinates.
    draws_alone = False
    #: Whether it may be updated by one launch with others of its kind (``fleets``).
    fleets = False
    #: Whether it moves now where errors guide it to (see ``subspaces.guided``).
    guided = False

    def __init__(self, name: str, parameter: nn.Parameter, shape: Sequence[int], lr_scale: float = 1.0) -> None:
        self.name = name
        self.parameter = parameter
        self.shape = tuple(shape)
        self.numel = math.prod(shape)
        self.lr_scale = lr_scale
        self.observed: Tensor | None = None  # what the next redraw is to go by, where that is data's to say
        self.turn: Turn | None = None  # None: moves in every step, along every direction
        self.neighbors: FlatBuffer | None = None  # the small coordinates that this one is drawn, shown and moved together with
        self.fleet: Joint | None = None
        self._drawn: tuple[Key, Tensor] | None = None  # the directions from key.direction on that a step asks for several times

    def moves(self, step: int, direction: int) -> bool:
        """Whether the coordinate is anything but 0 in a direction of a step."""
        return self.turn is None or self.turn.comes(step, direction)

    @tagged("directions")
    def many(self, directions: Directions, seed: int, step: int, first: int, count: int, alone: bool = False) -> Tensor:
        """Directions ``first`` to ``first + count - 1`` of a thin coordinate, float32, shape (count, *shape).

        Its neighbors' are drawn along unless it is to be ``alone``: who walks through many directions of one coordinate after another
        would make each forget what the other needs next.
        """
        neighbors = self.neighbors
        if neighbors is not None and not alone:
            return neighbors.many(directions, seed, step, first, count)[:, neighbors.places[self.name]].view(count, *self.shape)
        if self._drawn is not None:
            kept, z = self._drawn
            start, size = first - kept.direction, z.shape[0]
            if (kept.seed, kept.step) == (seed, step) and start >= 0 and start + count <= size:
                return z if count == size else z[start : start + count]
        key = Key(seed, step, first, self.name)
        begin, size = group_of(first, self.numel)
        if count == 1 and size > 1:  # the neighbors come at no cost, and are wanted next
            self._drawn = key._replace(direction=begin), directions.draw_many(key._replace(direction=begin), size, self.shape, self.device)
            return self._drawn[1][first - begin : first - begin + 1]
        self._drawn = key, directions.draw_many(key, count, self.shape, self.device)
        return self._drawn[1]

    @property
    def drawn(self) -> bool:
        """Whether directions are kept that this coordinate may still ask for."""
        return self._drawn is not None or (self.neighbors is not None and self.neighbors.holds(self.name))

    def drop(self) -> None:
        """Forget the directions that are kept between a step's evaluations and its update."""
        self._drawn = None
        if self.neighbors is not None:
            self.neighbors.done(self.name)

    @tagged("gradients")
    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        """Σ_k weights[k] · Z_k over the directions of a step, float32, of shape ``shape``."""
        neighbors = self.neighbors
        if neighbors is not None:
            return neighbors.weighted(directions, weights, seed, step)[neighbors.places[self.name]].view(self.shape).clone()
        if self.thin:
            return self._add_weighted(torch.zeros(self.shape, device=self.device), directions, weights, seed, step)
        keys = [Key(seed, step, direction, self.name) for direction in range(len(weights))]
        return directions.combine([(key, w) for key, w in zip(keys, weights, strict=True) if w], self.shape, self.device)

    @tagged("directions")
    def _add_weighted(self, total: Tensor, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        """total += Σ_k weights[k] · Z_k, for a thin coordinate."""
        for first in range(0, len(weights), GROUP):
            part = weights[first : first + GROUP]
            if any(part):
                z = self.many(directions, seed, step, first, len(part), alone=len(weights) > GROUP)
                add_weighted(total.view(-1), z.reshape(len(part), -1), part)
        return total

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    def begin_step(self, seed: int, step: int) -> Carry | None:
        """Redraw what is due at the start of ``step``; how first moments are to be carried over, if they are."""
        return None

    def kept(self) -> list[Tensor]:
        """The tensors that are kept between steps beside the weight."""
        return []

    @property
    def travels(self) -> bool:
        """Whether the weight may be away between evaluations (see ``residence``): it is read in forwards alone, and written as told."""
        return False

    @abc.abstractmethod
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        """The weight at θ + offset in the parameter's dtype: a new tensor, or the parameter itself if that is equal."""

    @abc.abstractmethod
    def value(self) -> Tensor:
        """θ as float32, shape ``shape``; may share memory with what is stored, so it is to be changed through :meth:`assign` only."""

    @abc.abstractmethod
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        """Set θ after step ``step``."""

    @abc.abstractmethod
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k, Z_k direction k of ``step``; in full space no large Z is ever whole."""

    def store(self) -> Tensor | None:
        """The contiguous tensor that holds θ, or the upper half of it, if neighbors may read and write θ there."""
        return None

    @property
    def own_store(self) -> Tensor | None:
        """What of :meth:`store`, or of its lower half, is the coordinate's own tensor, which may lie anywhere (see :meth:`rehouse`)."""
        return None

    def rehouse(self, memory: Tensor) -> None:
        """Keep :attr:`own_store` in ``memory``, flat, which has its values already."""
        raise NotImplementedError

    def store_residual(self) -> Tensor:
        """The lower half of θ, int16, flat, where the store is in half precision."""
        raise NotImplementedError

    def descended(self, keep: float, seed: int, step: int) -> None:  # noqa: B027 - as a rule there is nothing to note
        """Take note that neighbors have written θ after step ``step``, with decay ``keep``."""

    def decay(self, keep: float) -> None:  # noqa: B027 - a coordinate whose rule sees the weights themselves has nothing to do
        """Multiply the *weights* by ``keep`` where the rule, which sees coordinates only, cannot do it."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget what is pending: somebody has loaded new values into the parameter."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that, with the model's own weights, determine θ bit for bit."""
        return {}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        assert not state, f"{self.name} keeps no state, but was given {sorted(state)}"

    @property
    def decays_weights(self) -> bool:
        """Whether θ is the weight itself, so that a rule's weight decay means what its paper says."""
        return True
