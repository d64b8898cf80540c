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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zotune.io.execution import current, make_subclass
from zotune.io.memory_tags import memory_tag, tagged
from zotune.rng.directions import Directions
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Offset

#: A linear layer with more weights than this is computed in strips of about so many.
STRIP = 1 << 20
LARGE = 1 << 22
#: The strips of a low-rank one have about so many, on an accelerator and on a CPU: a product is all that a strip costs.
LOW_RANK_STRIP = (1 << 22, 1 << 17)
#: One with at most so many is formed in memory of its own, as one is that has more than this part of all numbers that move.
SMALL = 1 << 18
PART = 40
#: What computes a torch function with an :class:`LazyWeight` among its arguments; layer types enter theirs.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {}


class Room(threading.local):
    """Where the linear layers of one evaluation make their weights, a thread's in one place; ``moving``: how many numbers move in all."""

    def __init__(self, moving: int) -> None:
        self.most = min(LARGE, moving // PART)
        self.flat: Tensor | None = None

    def takes(self, coordinate: FullCoordinate) -> bool:
        """Whether it is worth it: float32 weights, whose forwards take twice as long, gained nothing that could be measured."""
        fits = coordinate.half and SMALL < coordinate.numel <= self.most and coordinate.device.type == "cpu"
        return fits and not current().whole_weights

    @tagged("directions")
    def of(self, numel: int, like: Tensor) -> Tensor:
        """Memory for ``numel`` numbers, which whoever comes next is given again."""
        if self.flat is None or self.flat.dtype != like.dtype or self.flat.numel() < numel:
            self.flat = None  # before there is another
            self.flat = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self.flat[:numel]


def in_strips(coordinate: FullCoordinate) -> bool:
    """Whether a linear layer makes its weight in strips."""
    return coordinate.numel > LARGE and coordinate.device.type == "cpu" and not current().whole_weights


class LazyWeight(torch.Tensor):
    """A weight at θ + offset, of which nothing is made before it is asked for."""

    coordinate: FullCoordinate | LowRankCoordinate
    directions: Directions
    offset: Offset
    room: Room

    @staticmethod
    def of(coordinate: FullCoordinate | LowRankCoordinate, directions: Directions, offset: Offset, room: Room) -> LazyWeight:
        unformed = make_subclass(LazyWeight, coordinate.parameter.detach())
        unformed.coordinate, unformed.directions, unformed.offset, unformed.room = coordinate, directions, offset, room
        return unformed

    @tagged("directions")
    def whole(self) -> Tensor:
        return self.coordinate.at(self.directions, self.offset)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            function = FUNCTIONS.get(func)
            if function is not None:
                return function(*args, **kwargs)
            if getattr(func, "__name__", "") == "__get__":  # dtype, device, shape: what is stored answers for it
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
            with memory_tag("directions"):
                return func(*[whole(a) for a in args], **{name: whole(a) for name, a in kwargs.items()})


def whole(argument: Any) -> Any:
    """An argument of a torch function with whole perturbed weights in place of lazy ones."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(whole(a) for a in argument)
    return argument.whole() if isinstance(argument, LazyWeight) else argument


@tagged("directions")
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
