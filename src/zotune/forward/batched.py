"""BatchedParameter parameters: what a module is lent in a batched evaluation, where every block of rows has weights of its own.

A :class:`BatchedParameter` is a tensor with the parameter's shape and dtype that knows its coordinate. torch hands every function it is used in
to ``__torch_function__`` here, which finds in :data:`FUNCTIONS` what computes that function with W as it is stored, once for all rows,
plus what each block adds. The layer types enter their functions there (``forward.layers``, one file each).

Whatever else is done with one raises :class:`~zotune.errors.NotBatchableError`: no function silently sees unperturbed weights.
Shapes: B = G · S blocks of q rows (of tokens, after flattening); x (B·q, n), V (n, r), U (G, m, r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward.batch_context import BatchContext
from zotune.io.execution import make_subclass
from zotune.io.memory_tags import tagged
from zotune.kernels import low_rank_kernels
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset

#: What computes a torch function with batched parameters among its arguments, by the name under which ``__torch_function__`` gets it.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {}


class BatchedParameter(torch.Tensor):
    """A parameter with a value a block; made by :func:`batched_parameter`."""

    plain: Tensor
    coordinate: Coordinate
    context: BatchContext
    blockwise: Tensor | None

    @staticmethod
    def of(plain: Tensor, coordinate: Coordinate, context: BatchContext, blockwise: Tensor | None = None) -> BatchedParameter:
        stacked = make_subclass(BatchedParameter, plain)
        stacked.plain, stacked.coordinate, stacked.context, stacked.blockwise = plain, coordinate, context, blockwise
        return stacked

    @property
    def low_rank(self) -> LowRankCoordinate | None:
        return self.coordinate if isinstance(self.coordinate, LowRankCoordinate) else None

    @tagged("directions")
    def full(self) -> Tensor:
        """The values of the blocks in the parameter's dtype, (B, *shape); for coordinates in full space."""
        if self.blockwise is not None:
            return self.blockwise
        if not self.coordinate.thin:
            if self.context.hold:
                raise NotBatchableError(f"{self.coordinate.name} is read as a whole")
            return torch.stack([self.coordinate.at(self.context.directions, offset) for offset in self.offsets()])
        return self.context.values(self.coordinate, self.plain.dtype)

    def offsets(self) -> list[Offset | None]:
        """Where each block evaluates; None: at θ."""
        stack, moves = self.context.stack, self.coordinate.moves
        return [
            Offset(scale, stack.seed, stack.step, direction) if scale and moves(stack.step, direction) else None
            for direction, scales in zip(stack.directions, stack.scales, strict=True)
            for scale in scales
        ]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            function = FUNCTIONS.get(name)
            if function is not None:
                return function(*args, **kwargs)
            if name == "__get__" or name in _QUESTIONS:  # dtype, device, shape...
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
        names = [arg.coordinate.name for arg in [*args, *kwargs.values()] if isinstance(arg, BatchedParameter)]
        raise NotBatchableError(f"the model uses {names[0] if names else 'a parameter'} in {name!r}, which has no batched form")


_QUESTIONS = {"dim", "size", "numel", "element_size", "stride", "is_contiguous", "is_floating_point", "is_complex", "get_device", "__len__"}


def batched_parameter(coordinate: Coordinate, context: BatchContext) -> BatchedParameter:
    """The coordinate's parameter at the stack's points; the same one for every module that reads it."""
    stacked = context.lent.get(coordinate.name)
    if stacked is None:
        stacked = context.lent[coordinate.name] = BatchedParameter.of(coordinate.parameter, coordinate, context)
    return stacked  # type: ignore[return-value]


# -- for the functions of layer types -----------------------------------------------------------------------------------------------------


def stored(tensor: Tensor | None) -> Tensor | None:
    """A parameter as it is stored, batched or not."""
    return tensor.plain if isinstance(tensor, BatchedParameter) else tensor


def context_of(*tensors: Any) -> BatchContext:
    """The context of the first batched parameter among ``tensors``.

    Raises:
        NotBatchableError: none is batched.
    """
    for tensor in tensors:
        if isinstance(tensor, BatchedParameter):
            return tensor.context
    raise NotBatchableError("a layer is called in a way that has no batched form")


def require_batchable(x: Any, **options: Any) -> None:
    """Raises NotBatchableError if a layer's input is a batched parameter itself, or an option is set that has no batched form."""
    if isinstance(x, BatchedParameter) or any(options.values()):
        raise NotBatchableError("a layer is called in a way that has no batched form")


@tagged("activations")
def by_block(x: Tensor, context: BatchContext, size: int) -> Tensor:
    """x (..., n) as (B, q, n), for a vector of ``size`` = n numbers.

    Raises:
        NotBatchableError: the sizes differ.
    """
    if x.shape[-1] != size:
        raise NotBatchableError(f"a vector of {size} numbers meets rows of {x.shape[-1]}")
    return context.spread(x, 1).reshape(context.blocks, -1, size)


def low_rank_of(weight: BatchedParameter) -> LowRankCoordinate:
    """The low-rank coordinate of a weight that has one."""
    coordinate = weight.low_rank
    assert coordinate is not None
    return coordinate


@tagged("activations")
def low_rank_output(first: Tensor | None, x: Tensor, weight: BatchedParameter, *, fixed_first: bool) -> Tensor:
    """What W's product is added to: the side path and the bias, (B, q, width), in as many passes over it as a bias takes alone.

    The input meets the fixed factor first, whose product siblings share, or the moving factor of its block.
    """
    coordinate, blocks = low_rank_of(weight), weight.context.blocks
    moved = trained_factor(weight, x.dtype)
    if fixed_first:
        left, right = weight.context.thin(coordinate, x), moved.transpose(1, 2)
    else:
        v = coordinate.v.T.to(x.dtype)
        left, right = torch.bmm(x.reshape(blocks, -1, x.shape[-1]), moved), v.expand(blocks, *v.shape)
    if first is None:
        return torch.bmm(left, right)
    kernel = low_rank_kernels(left, left.shape[2])
    if kernel is not None:
        return kernel.outer(first, left, right)
    if left.shape[2] == 1:
        return torch.addcmul(first, left, right)  # several times faster than a batched product with nothing to sum over
    return torch.baddbmm(first, left, right)


@tagged("directions")
def trained_factor(weight: BatchedParameter, dtype: torch.dtype) -> Tensor:
    """The moving factor A + s U_g of every block, (B, rows of A, r)."""
    coordinate = low_rank_of(weight)
    if type(coordinate).expand is LowRankCoordinate.expand:
        return weight.context.values(coordinate, dtype)
    return coordinate.expand(weight.context.values(coordinate, torch.float32)).to(dtype)
