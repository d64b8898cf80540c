"""Embeddings in full space: a lookup of ids makes the perturbed rows of those ids alone, not the whole perturbed table.

Directions come from counters (``counter``), so a row can be drawn without the others. What an ``nn.Embedding`` is lent is a tensor of the
stored weight's shape that knows its coordinate; torch hands every function it is used in to ``__torch_function__`` here. A lookup gets
its rows; any other function (a head that is tied by reaching in, a lookup with ``max_norm``) gets the whole perturbed weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.coordinates import Coordinate, Offset
from zotune.directions import Directions
from zotune.subspaces import FullCoordinate


def lender(module: nn.Module, coordinate: Coordinate, directions: Directions, offset: Offset) -> Callable[[], Tensor]:
    """What hands ``module`` its parameter at θ + offset."""
    if isinstance(module, nn.Embedding) and isinstance(coordinate, FullCoordinate) and not coordinate.thin:
        return partial(LookedUp.of, coordinate, directions, offset)
    return partial(coordinate.at, directions, offset)


class LookedUp(torch.Tensor):
    """An embedding's weight at θ + offset, of which no row is made before it is asked for."""

    coordinate: FullCoordinate
    directions: Directions
    offset: Offset

    @staticmethod
    def of(coordinate: FullCoordinate, directions: Directions, offset: Offset) -> LookedUp:
        lookup = torch.Tensor._make_subclass(LookedUp, coordinate.parameter.detach())
        lookup.coordinate, lookup.directions, lookup.offset = coordinate, directions, offset
        return lookup

    def whole(self) -> Tensor:
        return self.coordinate.at(self.directions, self.offset)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding:
                return _embedding(*args, **kwargs)
            if getattr(func, "__name__", "") == "__get__":  # dtype, device, shape: what is stored answers for it
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
            return func(*[_whole(a) for a in args], **{name: _whole(a) for name, a in kwargs.items()})


def _whole(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_whole(a) for a in argument)
    return argument.whole() if isinstance(argument, LookedUp) else argument


def _embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *others: Any, **named: Any
) -> Tensor:
    if max_norm is None and isinstance(weight, LookedUp):
        rows, places = torch.unique(input, return_inverse=True)
        if 2 * rows.numel() < weight.coordinate.shape[0]:
            return F.embedding(places, weight.coordinate.rows_at(weight.directions, weight.offset, rows.long()))
    return F.embedding(_whole(input), _whole(weight), padding_idx, max_norm, *others, **named)
