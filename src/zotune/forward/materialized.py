"""Low-rank weights materialized for one product, where that costs less memory traffic than the low-rank hook.

The hook's (x V) Aᵀ takes one pass over the layer's input and two over its output. W + A Vᵀ takes one pass over W that reads and one that
writes. On an accelerator, whose products are faster than its memory, the second is better from a thousand or two tokens on. A linear layer
reads a :class:`MaterializedWeight` and decides when its input is known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.io.execution import make_subclass
from zotune.io.memory_tags import tagged
from zotune.kernels import low_rank_kernels
from zotune.rng.directions import Directions
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Offset
from zotune.weights.quantized_linear import owner_of

#: Passes over W that materializing it costs; less than two, because the product reads part of it from the cache.
PASSES = 1.5
#: Forms of torch functions with a :class:`MaterializedWeight` as their second argument; the layer types register theirs.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {}


def should_materialize(coordinate: LowRankCoordinate, rows: int) -> bool:
    """Whether a linear layer materializes its weight for so many rows (tokens) at one point."""
    m, n = coordinate.parameter.shape
    return rows * (n + 2 * m) > PASSES * m * n and owner_of(coordinate.parameter) is None and can_materialize(coordinate)


def can_materialize(coordinate: LowRankCoordinate) -> bool:
    """Whether a layer with this weight may ever materialize it."""
    return not coordinate.transposed and kernel_of(coordinate) is not None


def kernel_of(coordinate: LowRankCoordinate) -> Any:
    weight = coordinate.parameter.data
    return low_rank_kernels(weight, coordinate.rank) if weight.is_contiguous() else None


@tagged("directions")
def materialize(coordinate: LowRankCoordinate, left: Tensor) -> Tensor:
    """W + A_b Vᵀ in W's dtype, (B, m, n), for A (B, m, r)."""
    return kernel_of(coordinate).add_low_rank(coordinate.parameter.data, None, left, coordinate.v)  # type: ignore[no-any-return]


def weight_factory(coordinate: LowRankCoordinate, directions: Directions, offset: Offset) -> Callable[[], Tensor]:
    """A function that makes a linear layer's weight at θ + offset, to be read in the layer's own forward only."""
    return partial(MaterializedWeight.of, coordinate, coordinate.core_at(directions, offset))


class MaterializedWeight(torch.Tensor):
    """The weight of a linear layer at a point of its low-rank coordinates."""

    coordinate: LowRankCoordinate
    core: Tensor

    @staticmethod
    def of(coordinate: LowRankCoordinate, core: Tensor) -> MaterializedWeight:
        weight = make_subclass(MaterializedWeight, coordinate.parameter.detach())
        weight.coordinate, weight.core = coordinate, core
        return weight  # type: ignore[no-any-return]

    def whole(self) -> Tensor:
        return materialize(self.coordinate, self.coordinate.expand(self.core).unsqueeze(0))[0]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            function = FUNCTIONS.get(func)
            if function is not None and isinstance(args[1], MaterializedWeight):
                return function(*args, **kwargs)
            if getattr(func, "__name__", "") == "__get__":  # dtype, device, shape: those of the stored weight
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
            return func(*map(_whole, args), **{name: _whole(argument) for name, argument in kwargs.items()})


def _whole(argument: Any) -> Any:
    return argument.whole() if isinstance(argument, MaterializedWeight) else argument
