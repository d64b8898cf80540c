"""Weights that are perturbed a part at a time, inside the operation that uses them.

Directions come from counters (``counter``), so any rows of a matrix can be drawn without the others, and the rows of W + A Vᵀ need those
of W and A alone. What an ``nn.Embedding`` or a large
``nn.Linear`` is lent is a tensor of the stored weight's shape that knows its coordinate; torch hands every function it is used in to
``__torch_function__`` here:

- a lookup makes the rows of the ids it is given, bit for bit those of the whole perturbed table;
- a linear layer makes a strip of rows, uses it, and makes the next in the same memory: a head over a large vocabulary costs a few
  megabytes, not a copy of itself (in full space on a CPU only; an accelerator is fastest with one large product. Low rank goes this way
  for once, to be compared with the side path, or seldom);
- smaller linear layers in half precision on a CPU make their weights one after the other in the same memory: the C library hands
  memory of such a size back to the system when it is let go, and asking for it anew costs a page fault every 4 KiB;
- any other function (a lookup with ``max_norm``, a parent that reaches in) gets the whole perturbed weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.coordinates import Coordinate, Offset
from zotune.directions import Directions
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.full import is_sharded

#: A linear layer with more weights than this is computed in strips of about so many.
STRIP = 1 << 20
LARGE = 1 << 22
#: The strips of a low-rank one have about so many, on an accelerator and on a CPU: a product is all that a strip costs.
BESIDE = (1 << 22, 1 << 17)
#: One with at most so many is formed in memory of its own, as one is that has more than this part of all numbers that move.
SMALL = 1 << 18
PART = 40


class Room(threading.local):
    """Where the linear layers of one evaluation make their weights, a thread's in one place; ``moving``: how many numbers move in all."""

    def __init__(self, moving: int) -> None:
        self.most = min(LARGE, moving // PART)
        self.flat: Tensor | None = None

    def takes(self, coordinate: FullCoordinate) -> bool:
        """Whether it is worth it: float32 weights, whose forwards take twice as long, gained nothing that could be measured."""
        return coordinate.half and SMALL < coordinate.numel <= self.most and coordinate.device.type == "cpu"

    def of(self, numel: int, like: Tensor) -> Tensor:
        """Memory for ``numel`` numbers, which whoever comes next is given again."""
        if self.flat is None or self.flat.dtype != like.dtype or self.flat.numel() < numel:
            self.flat = None  # before there is another
            self.flat = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self.flat[:numel]


def lender(module: nn.Module, coordinate: Coordinate, directions: Directions, offset: Offset, room: Room) -> Callable[[], Tensor]:
    """What hands ``module`` its parameter at θ + offset."""
    if not coordinate.moves(offset.step, offset.direction):
        return partial(coordinate.at, directions, None)
    if isinstance(coordinate, FullCoordinate) and not (coordinate.thin or coordinate.sharded) and len(coordinate.shape) == 2:
        large = coordinate.numel > LARGE and coordinate.device.type == "cpu"
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and (large or room.takes(coordinate))):
            return partial(Unformed.of, coordinate, directions, offset, room)
    if isinstance(coordinate, LowRankCoordinate) and not is_sharded(coordinate.parameter):
        forward, large = type(module).forward, coordinate.parameter.numel() > BESIDE[coordinate.device.type == "cpu"]
        if isinstance(module, nn.Embedding) or (large and forward is nn.Linear.forward):
            return partial(Unformed.of, coordinate, directions, offset, room)
    return partial(coordinate.at, directions, offset)


class Unformed(torch.Tensor):
    """A weight at θ + offset, of which nothing is made before it is asked for."""

    coordinate: FullCoordinate | LowRankCoordinate
    directions: Directions
    offset: Offset
    room: Room

    @staticmethod
    def of(coordinate: FullCoordinate | LowRankCoordinate, directions: Directions, offset: Offset, room: Room) -> Unformed:
        unformed = torch.Tensor._make_subclass(Unformed, coordinate.parameter.detach())
        unformed.coordinate, unformed.directions, unformed.offset, unformed.room = coordinate, directions, offset, room
        return unformed

    def whole(self) -> Tensor:
        return self.coordinate.at(self.directions, self.offset)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding:
                return _embedding(*args, **kwargs)
            if func is F.linear:
                return _linear(*args, **kwargs)
            if getattr(func, "__name__", "") == "__get__":  # dtype, device, shape: what is stored answers for it
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
            return func(*[_whole(a) for a in args], **{name: _whole(a) for name, a in kwargs.items()})


def _whole(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_whole(a) for a in argument)
    return argument.whole() if isinstance(argument, Unformed) else argument


def _embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *others: Any, **named: Any
) -> Tensor:
    if max_norm is None and isinstance(weight, Unformed):
        found = rows_looked_up(weight.coordinate, weight.directions, weight.offset, input)
        if found is not None:
            return found
    return F.embedding(_whole(input), _whole(weight), padding_idx, max_norm, *others, **named)


def rows_looked_up(coordinate: FullCoordinate | LowRankCoordinate, directions: Directions, offset: Offset, ids: Tensor) -> Tensor | None:
    """(W + s Z)[ids] from the rows of these ids alone; None where that saves nothing."""
    number = coordinate.parameter.shape[0]
    if ids.device.type != "cpu":  # to count the different ones would mean waiting for the device
        if 2 * ids.numel() >= number:
            return None
        rows: Tensor = coordinate.rows_at(directions, offset, ids.reshape(-1).long())
        return rows.view(*ids.shape, -1)
    rows, places = torch.unique(ids, return_inverse=True)
    if 2 * rows.numel() >= number:
        return None
    return F.embedding(places, coordinate.rows_at(directions, offset, rows.long()))


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    plain = isinstance(weight, Unformed) and not isinstance(input, Unformed) and not isinstance(bias, Unformed)
    if not plain or (torch.is_grad_enabled() and input.requires_grad):
        return F.linear(_whole(input), _whole(weight), _whole(bias))
    coordinate = weight.coordinate
    if isinstance(coordinate, FullCoordinate):
        if weight.room.takes(coordinate):
            room = weight.room.of(coordinate.numel, coordinate.parameter)
            return F.linear(input, coordinate.at_in(room, weight.directions, weight.offset), bias)
        if coordinate.numel <= LARGE or weight.device.type != "cpu":
            return F.linear(input, weight.whole(), bias)
    rows, columns = weight.shape
    x = input.reshape(-1, columns)
    out = x.new_empty(x.shape[0], rows)
    few = STRIP if isinstance(coordinate, FullCoordinate) else BESIDE[weight.device.type == "cpu"]
    for strip, part in coordinate.strips_at(weight.directions, weight.offset, max(1, few // columns)):
        torch.mm(x, part.T, out=out[:, strip])
    if bias is not None:
        out += bias
    return out.view(*input.shape[:-1], rows)
