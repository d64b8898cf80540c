"""Low-rank weights that are formed for the length of one product, where that costs less traffic than going beside.

Beside a layer's own product, (x V) Aᵀ takes a pass over its input and two over its output. W + A Vᵀ takes a pass over W that reads it and
one that writes. On an accelerator, whose products run faster than its memory, a layer that sees more than a thousand or two tokens is
better off with the second. What a linear layer is lent for that (``MaterializedWeight``) decides when it is given its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.kernels import low_rank_kernels
from zotune.rng.directions import Directions
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Offset
from zotune.weights.quantized_linear import owner_of

#: Passes over W that forming it costs, some of which the product would have made: what it reads is still in the cache.
PASSES = 1.5
#: What computes a torch function with a :class:`MaterializedWeight` as its second argument; layer types enter theirs.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {}


def forms(coordinate: LowRankCoordinate, rows: int) -> bool:
    """Whether a linear layer that is given so many rows (tokens) at one point should form its weight."""
    m, n = coordinate.parameter.shape
    enough = rows * (n + 2 * m) > PASSES * m * n and not coordinate.transposed
    return enough and owner_of(coordinate.parameter) is None and kernel_of(coordinate) is not None


def kernel_of(coordinate: LowRankCoordinate) -> Any:
    """What forms its weight; None where nothing does that well."""
    weight = coordinate.parameter.data
    return low_rank_kernels(weight, coordinate.rank) if weight.is_contiguous() else None


@tagged("directions")
def may_form(coordinate: LowRankCoordinate) -> bool:
    """Whether a layer with this weight may ever form it."""
    return not coordinate.transposed and kernel_of(coordinate) is not None


@tagged("directions")
def formed(coordinate: LowRankCoordinate, left: Tensor) -> Tensor:
    """W + A_b Vᵀ in W's dtype, (B, m, n), for A (B, m, r)."""
    weights: Tensor = kernel_of(coordinate).plus(coordinate.parameter.data, None, left, coordinate.v)
    return weights


def lender(coordinate: LowRankCoordinate, directions: Directions, offset: Offset) -> Callable[[], Tensor]:
    """What hands a linear layer its weight at θ + offset, to be used in its own forward alone."""
    return partial(MaterializedWeight.of, coordinate, coordinate.core_at(directions, offset))


class MaterializedWeight(torch.Tensor):
    """The weight of a linear layer at a point of its low-rank coordinates."""

    coordinate: LowRankCoordinate
    core: Tensor

    @staticmethod
    def of(coordinate: LowRankCoordinate, core: Tensor) -> MaterializedWeight:
        lent = torch.Tensor._make_subclass(MaterializedWeight, coordinate.parameter.detach())
        lent.coordinate, lent.core = coordinate, core
        return lent

    def whole(self) -> Tensor:
        return formed(self.coordinate, self.coordinate.expand(self.core).unsqueeze(0))[0]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            function = FUNCTIONS.get(func)
            if function is not None and isinstance(args[1], MaterializedWeight):
                return function(*args, **kwargs)
            if getattr(func, "__name__", "") == "__get__":  # dtype, device, shape: what is stored answers for it
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
            whole = [a.whole() if isinstance(a, MaterializedWeight) else a for a in args]
            return func(*whole, **{name: a.whole() if isinstance(a, MaterializedWeight) else a for name, a in kwargs.items()})
