"""Lazy weights: perturbed a part at a time, inside the function that uses them.

Directions are counter-based (``rng.counter``), so any rows of a matrix can be drawn alone, and rows of W + A Vᵀ need those of W and A only.
A :class:`LazyWeight` has the stored weight's shape and a reference to its coordinate. torch passes every function that uses one to
``__torch_function__``:

- a lookup generates the rows of its ids, bit for bit those of the whole perturbed table;
- a large linear layer generates a strip of rows, multiplies, and generates the next in the same memory: a head over a large vocabulary
  costs a few megabytes, not a copy of itself. In full space on a CPU only: an accelerator is fastest with one large product. Low-rank
  weights go this way when they are compared with the hook, or rarely;
- smaller linear layers in half precision on a CPU share one :class:`WeightBuffer`: the C library returns memory of that size to the system
  when it is freed, and new memory costs a page fault every 4 KiB;
- any other function (a lookup with ``max_norm``, a parent that reads the weight) gets the whole perturbed weight.
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

#: A linear layer with more than ``LARGE`` elements is computed in strips of about ``STRIP``.
STRIP = 1 << 20
LARGE = 1 << 22
#: Elements of a low-rank strip, on an accelerator and on a CPU: a strip costs only its product.
LOW_RANK_STRIP = (1 << 22, 1 << 17)
#: The shared buffer takes weights of more elements than ``SMALL``, up to one ``PART``-th of all trained elements.
SMALL = 1 << 18
PART = 40
#: Lazy forms of torch functions; the layer types register theirs.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {}


class WeightBuffer(threading.local):
    """Memory shared by the weights of one evaluation's linear layers, one buffer per thread.

    Args:
        trained: trained elements of the model.
    """

    def __init__(self, trained: int) -> None:
        self.max_numel = min(LARGE, trained // PART)
        self.flat: Tensor | None = None

    def accepts(self, coordinate: FullCoordinate) -> bool:
        """Whether it pays off. It does not for float32 weights, whose forwards take twice as long."""
        fits = coordinate.half and SMALL < coordinate.numel <= self.max_numel and coordinate.device.type == "cpu"
        return fits and not current().whole_weights

    @tagged("directions")
    def take(self, numel: int, like: Tensor) -> Tensor:
        """The memory of ``numel`` elements; the next call returns the same memory."""
        if self.flat is None or self.flat.dtype != like.dtype or self.flat.numel() < numel:
            self.flat = None  # frees it before the next allocation
            self.flat = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self.flat[:numel]


def in_strips(coordinate: FullCoordinate) -> bool:
    """Whether a linear layer generates its weight in strips."""
    return coordinate.numel > LARGE and coordinate.device.type == "cpu" and not current().whole_weights


class LazyWeight(torch.Tensor):
    """A weight at θ + offset, generated when it is used."""

    coordinate: FullCoordinate | LowRankCoordinate
    directions: Directions
    offset: Offset
    buffer: WeightBuffer

    @staticmethod
    def of(coordinate: FullCoordinate | LowRankCoordinate, directions: Directions, offset: Offset, buffer: WeightBuffer) -> LazyWeight:
        lazy = make_subclass(LazyWeight, coordinate.parameter.detach())
        lazy.coordinate, lazy.directions, lazy.offset, lazy.buffer = coordinate, directions, offset, buffer
        return lazy  # type: ignore[no-any-return]

    def whole(self) -> Tensor:
        return self.coordinate.at(self.directions, self.offset)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            function = FUNCTIONS.get(func)
            if function is not None:
                return function(*args, **kwargs)
            if getattr(func, "__name__", "") == "__get__":  # dtype, device, shape: those of the stored weight
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
            with memory_tag("directions"):
                return func(*[whole(a) for a in args], **{name: whole(a) for name, a in kwargs.items()})


def whole(argument: Any) -> Any:
    """An argument of a torch function, with whole perturbed weights in place of lazy ones."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(whole(a) for a in argument)
    return argument.whole() if isinstance(argument, LazyWeight) else argument


@tagged("directions")
def looked_up_rows(coordinate: FullCoordinate | LowRankCoordinate, directions: Directions, offset: Offset, ids: Tensor) -> Tensor | None:
    """(W + s Z)[ids] from the rows of these ids alone; None where that saves nothing."""
    height = coordinate.parameter.shape[0]
    if ids.device.type != "cpu":  # counting unique ids would wait for the device
        if 2 * ids.numel() >= height:
            return None
        return coordinate.rows_at(directions, offset, ids.reshape(-1).long()).view(*ids.shape, -1)
    unique, places = torch.unique(ids, return_inverse=True)
    if 2 * unique.numel() >= height:
        return None
    return F.embedding(places, coordinate.rows_at(directions, offset, unique.long()))
