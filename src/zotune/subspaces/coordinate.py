"""Coordinates θ of one parameter, the points θ + offset at which it is evaluated, and how its directions are drawn, cached and summed."""

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
from zotune.subspaces.matrix_view import matrix_view

#: Full-space matrices with a side of at most this many (adapters) are thin: several of their directions are in memory at a time.
THIN = 64


def is_thin(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is a scalar or a vector, or consists of thin matrices (see ``matrix_view``)."""
    view = matrix_view(shape)
    return view is None or min(view.rows, view.columns) <= THIN


#: Maps a first moment of θ, linear in its estimates, to a new basis.
MomentTransport = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Offset:
    """A point to evaluate at: θ + scale · Z, with Z direction number ``direction`` of step ``step`` of run ``seed``."""

    scale: float
    seed: int
    step: int
    direction: int

    def key(self, name: str) -> Key:
        return Key(self.seed, self.step, self.direction, name)


@dataclass(frozen=True)
class BlockSchedule:
    """When block ``block`` of ``blocks`` is trained: every blocks-th step, or along every blocks-th direction of each step."""

    block: int
    blocks: int
    by_direction: bool

    def is_active(self, step: int, direction: int) -> bool:
        return (direction if self.by_direction else step) % self.blocks == self.block


class CoordinateGroup(Protocol):
    """Coordinates that are updated together, with one learning-rate scale."""

    members: list[Coordinate]
    lr_scale: float

    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k for all members, bit for bit like each member's own."""
        ...

    def drop(self) -> None:
        """Discard cached directions."""
        ...


class CoordinateBuffer(CoordinateGroup, Protocol):
    """Coordinates whose elements are drawn together; :class:`~zotune.subspaces.flat_buffer.FlatBuffer` is one."""

    places: dict[str, slice]
    stored: bool

    def draw(self, directions: Directions, seed: int, step: int, first: int, count: int) -> Tensor:
        """Directions of all members, (count, elements)."""
        ...

    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        """Σ_k weights[k] · Z_k of all members, (elements,)."""
        ...

    def caches(self, name: str) -> bool:
        """Whether directions are cached for a member."""
        ...

    def release(self, name: str) -> None:
        """A member needs the cached directions no more."""
        ...


class Coordinate(abc.ABC):
    """The coordinates of one parameter.

    Attributes:
        shape: of their direction Z.
        lr_scale: multiplies the learning rate.
        observed: data for the next redraw, if the subspace is built from data.
        anchored: whether weight decay shrinks the weight toward an anchor θ₀ in place of 0.
        anchor: θ₀'s elements that are stored here, flat; None where there is none, or what training adds is stored apart.
        schedule: when they are trained; None: in every step, along every direction.
        flat_buffer: the flat buffer that stores them, if any.
        multi_tensor: the multi-tensor group that updates them, if any.
    """

    #: Several directions may be in memory at a time; those of an evaluation are cached until the update (:meth:`drop` discards them).
    thin = True
    #: Directions are never drawn together with those of other small coordinates.
    draws_separately = False
    #: May be updated by a multi-tensor group.
    supports_multi_tensor = False
    #: Whether an update is rounded: once, however many directions it has.
    rounds = False
    #: Trained now in a subspace of output gradients (see ``subspaces.guided``).
    guided = False
    #: The weight may be offloaded between evaluations (see ``weights.placement``).
    supports_offload = False
    #: θ is the weight itself, so a rule's weight decay acts on the weight.
    decays_weights = True

    def __init__(self, name: str, parameter: nn.Parameter, shape: Sequence[int], lr_scale: float = 1.0) -> None:
        self.name = name
        self.parameter = parameter
        self.shape = tuple(shape)
        self.numel = math.prod(shape)
        self.lr_scale = lr_scale
        self.observed: Tensor | None = None
        self.anchored = False
        self.anchor: Tensor | None = None
        self.schedule: BlockSchedule | None = None
        self.flat_buffer: CoordinateBuffer | None = None
        self.multi_tensor: CoordinateGroup | None = None
        self._drawn: tuple[Key, Tensor] | None = None  # cached directions, from key.direction on

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    def is_active(self, step: int, direction: int) -> bool:
        """Whether the coordinate is nonzero in a direction of a step."""
        return self.schedule is None or self.schedule.is_active(step, direction)

    # -- directions -----------------------------------------------------------------------------------------------------------------

    @tagged("directions")
    def draw(self, directions: Directions, seed: int, step: int, first: int, count: int, alone: bool = False) -> Tensor:
        """Directions ``first`` to ``first + count - 1`` of a thin coordinate, float32, shape (count, *shape).

        The whole flat buffer is drawn unless ``alone``: a loop over many directions of one coordinate would evict the others' cache.
        """
        buffer = self.flat_buffer
        if buffer is not None and not alone:
            return buffer.draw(directions, seed, step, first, count)[:, buffer.places[self.name]].view(count, *self.shape)
        if self._drawn is not None:
            cached, z = self._drawn
            start, size = first - cached.direction, z.shape[0]
            if (cached.seed, cached.step) == (seed, step) and start >= 0 and start + count <= size:
                return z if count == size else z[start : start + count]
        key = Key(seed, step, first, self.name)
        begin, size = group_of(first, self.numel)
        if count == 1 and size > 1:  # the rest of the group costs nothing and is asked for next
            self._drawn = key._replace(direction=begin), directions.draw_many(key._replace(direction=begin), size, self.shape, self.device)
            return self._drawn[1][first - begin : first - begin + 1]
        self._drawn = key, directions.draw_many(key, count, self.shape, self.device)
        return self._drawn[1]

    @property
    def drawn(self) -> bool:
        """Whether directions are cached for this coordinate."""
        return self._drawn is not None or (self.flat_buffer is not None and self.flat_buffer.caches(self.name))

    def drop(self) -> None:
        """Discard cached directions."""
        self._drawn = None
        if self.flat_buffer is not None:
            self.flat_buffer.release(self.name)

    @tagged("gradients")
    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        """Σ_k weights[k] · Z_k over the directions of a step, float32, of shape ``shape``."""
        buffer = self.flat_buffer
        if buffer is not None:
            return buffer.weighted(directions, weights, seed, step)[buffer.places[self.name]].view(self.shape).clone()
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
                z = self.draw(directions, seed, step, first, len(part), alone=len(weights) > GROUP)
                add_weighted(total.view(-1), z.reshape(len(part), -1), part)
        return total

    # -- evaluation and update ------------------------------------------------------------------------------------------------------

    def begin_step(self, seed: int, step: int) -> MomentTransport | None:
        """Redraw what is due at the start of ``step``; the map of first moments to the new basis, if they are carried over."""
        return None

    @abc.abstractmethod
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        """The weight at θ + offset in the parameter's dtype: a new tensor, or the parameter itself if that is equal."""

    @abc.abstractmethod
    def value(self) -> Tensor:
        """θ as float32, shape ``shape``; may share memory with the stored θ, so change it through :meth:`assign` only."""

    @abc.abstractmethod
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        """Set θ after step ``step``."""

    @abc.abstractmethod
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k, Z_k direction k of ``step``; in full space no large Z is materialized."""

    def set_anchor(self, anchor: Tensor | None) -> None:
        """Have weight decay shrink the weight toward ``anchor``, see the attribute."""
        self.anchored, self.anchor = True, anchor

    def decayed(self, value: Tensor, keep: float) -> Tensor:
        """``value`` of θ shrunk by ``keep``, in place, where θ is the weight (:func:`shrink`)."""
        return shrink(value.view(-1), keep, self.anchor).view(value.shape)

    def decay(self, keep: float) -> None:  # noqa: B027 - nothing to do where the rule updates the weights themselves
        """Multiply the *weights* by ``keep`` where the rule, which updates θ only, cannot."""

    # -- storage --------------------------------------------------------------------------------------------------------------------

    def stored_tensor(self) -> Tensor | None:
        """The contiguous tensor of θ, or of its upper half, if a flat buffer may read and write it."""
        return None

    @property
    def owned_tensor(self) -> Tensor | None:
        """The part of :meth:`stored_tensor`, or the lower half of θ, that the coordinate owns and :meth:`rebind` may move."""
        return None

    def rebind(self, memory: Tensor) -> None:
        """Use ``memory``, flat and with equal values, as :attr:`owned_tensor`."""
        raise NotImplementedError

    def use_residual(self) -> None:  # noqa: B027 - nothing to do where θ is not a weight
        """Keep what rounding a half-precision θ would lose, from now on."""

    def residual_tensor(self) -> Tensor:
        """The lower half of θ, int16, flat, where it is stored in half precision."""
        raise NotImplementedError

    def mark_updated(self, keep: float, seed: int, step: int) -> None:  # noqa: B027 - most coordinates record nothing
        """Record that a flat buffer has written θ after step ``step``, with decay ``keep``."""

    def kept(self) -> list[Tensor]:
        """The tensors kept between steps beside the weight."""
        return []

    def written(self) -> list[Tensor]:
        """The tensors beside the parameter that make up its weight and are written by updates."""
        return []

    @abc.abstractmethod
    def reset(self) -> None:
        """Discard pending updates: new values have been loaded into the parameter."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that, with the model's own weights, determine θ bit for bit."""
        return {}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        assert not state, f"{self.name} keeps no state, but was given {sorted(state)}"


def shrink(block: Tensor, keep: float, anchor: Tensor | None) -> Tensor:
    """block ← keep · block, or θ₀ + keep · (block − θ₀) with the anchor's elements θ₀, in place; exactly the same where block is θ₀."""
    if keep == 1.0:
        return block
    if anchor is None:
        return block.mul_(keep)
    return block.lerp_(anchor.to(block.device, block.dtype), 1 - keep)


def matching(saved: Tensor, here: Tensor, name: str) -> Tensor:
    """A saved tensor on the device of the one that it is copied into; ValueError where shape or dtype differ."""
    if saved.shape != here.shape or saved.dtype != here.dtype:
        raise ValueError(
            f"the saved state of {name} is {saved.dtype} of shape {tuple(saved.shape)} where this run has {here.dtype} of shape "
            f"{tuple(here.shape)}."
        )
    return saved.to(here.device)


def unshared(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a view: what is saved has memory of its own."""
    return tensor if tensor._base is None else tensor.clone()
