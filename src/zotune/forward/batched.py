"""Batched parameters: what modules read in a batched evaluation, where every block of rows has its own weights.

A :class:`BatchedParameter` is a tensor with the parameter's shape and dtype and a reference to its coordinate. torch passes every function
that uses one to ``__torch_function__``. It looks up the batched form of that function in :data:`FUNCTIONS`, where the layer types register
theirs (``forward.layers``). A function without a batched form raises :class:`~zotune.errors.NotBatchableError`, so no function computes
with unperturbed weights unnoticed.

Shapes: B = G · S blocks of q rows (tokens, after flattening); x (B·q, n), V (n, r), U (G, m, r).
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

#: Batched forms of torch functions, by the name of the function in ``__torch_function__``.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {}
#: Properties of the stored tensor.
_METADATA = {
    "__get__", "__len__", "dim", "size", "numel", "element_size", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "get_device",
}  # fmt: skip


class BatchedParameter(torch.Tensor):
    """A parameter with a value per block.

    Attributes:
        stored: the parameter.
        context: of the evaluation.
        converted: the values, if the model has converted them already.
    """

    stored: Tensor
    coordinate: Coordinate
    context: BatchContext
    converted: Tensor | None

    @staticmethod
    def of(stored: Tensor, coordinate: Coordinate, context: BatchContext, converted: Tensor | None = None) -> BatchedParameter:
        parameter = make_subclass(BatchedParameter, stored)
        parameter.stored, parameter.coordinate, parameter.context, parameter.converted = stored, coordinate, context, converted
        return parameter  # type: ignore[no-any-return]

    @property
    def low_rank(self) -> LowRankCoordinate | None:
        return self.coordinate if isinstance(self.coordinate, LowRankCoordinate) else None

    def block_values(self) -> Tensor:
        """The value of every block in the parameter's dtype, (B, *shape); for full-space coordinates."""
        if self.converted is not None:
            return self.converted
        if not self.coordinate.thin:
            return self._materialized()
        return self.context.values(self.coordinate, self.stored.dtype)

    @tagged("directions")
    def _materialized(self) -> Tensor:
        if self.context.persistent:
            raise NotBatchableError(f"{self.coordinate.name} is read as a whole")
        return torch.stack([self.coordinate.at(self.context.directions, offset) for offset in self.offsets()])

    def offsets(self) -> list[Offset | None]:
        """The offset of each block; None: θ."""
        return self.context.offsets(self.coordinate)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            function = FUNCTIONS.get(name)
            if function is not None:
                return function(*args, **kwargs)
            if name in _METADATA:
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
        names = [arg.coordinate.name for arg in [*args, *kwargs.values()] if isinstance(arg, BatchedParameter)]
        raise NotBatchableError(f"the model uses {names[0] if names else 'a parameter'} in {name!r}, which has no batched form")


def batched_parameter(coordinate: Coordinate, context: BatchContext) -> Tensor:
    """The batched parameter of a coordinate; the same object for every module that reads it."""
    parameter = context.parameters.get(coordinate.name)
    if parameter is None:
        parameter = context.parameters[coordinate.name] = BatchedParameter.of(coordinate.parameter, coordinate, context)
    return parameter


# -- for the batched functions of layer types ---------------------------------------------------------------------------------------------


def context_of(*tensors: Any) -> BatchContext:
    """The context of the first batched parameter among ``tensors``.

    Raises:
        NotBatchableError: none is batched.
    """
    for tensor in tensors:
        if isinstance(tensor, BatchedParameter):
            return tensor.context
    raise NotBatchableError("a layer is called in a way that has no batched form")


def require_batchable(x: Any, unsupported: bool = False) -> None:
    """Raises NotBatchableError if a layer's input is a batched parameter itself, or the call uses an option without a batched form."""
    if unsupported or isinstance(x, BatchedParameter):
        raise NotBatchableError("a layer is called in a way that has no batched form")


def vector_by_block(vector: Tensor | None) -> Tensor | None:
    """A vector that is added to or multiplied with rows (B, q, n): (B, 1, n) if batched, else unchanged."""
    return vector.block_values().unsqueeze(1) if isinstance(vector, BatchedParameter) else vector


def low_rank_of(weight: BatchedParameter) -> LowRankCoordinate:
    """The low-rank coordinate of a weight that has one."""
    coordinate = weight.coordinate
    assert isinstance(coordinate, LowRankCoordinate)
    return coordinate


def low_rank_output(bias: Tensor | None, x: Tensor, weight: BatchedParameter, *, fixed_first: bool) -> Tensor:
    """b + (x V)(A + s U_g)ᵀ, (B, q, width), to which W's product is then added; as many passes over the output as a bias alone.

    Args:
        bias: (B, 1, width), (width,) or None.
        x: (B · q, n).
        fixed_first: the input meets the fixed factor first, whose product siblings share; otherwise the trained factor of its block.
    """
    coordinate, blocks = low_rank_of(weight), weight.context.blocks
    trained = trained_factor(weight, x.dtype)
    if fixed_first:
        left, right = weight.context.project(coordinate, x), trained.transpose(1, 2)
    else:
        v = coordinate.v.T.to(x.dtype)
        left, right = torch.bmm(x.reshape(blocks, -1, x.shape[-1]), trained), v.expand(blocks, *v.shape)
    if bias is None:
        return torch.bmm(left, right)
    kernel = low_rank_kernels(left, left.shape[2])
    if kernel is not None:
        return kernel.outer(bias, left, right)  # type: ignore[no-any-return]
    if left.shape[2] == 1:
        return torch.addcmul(bias, left, right)  # several times faster than a batched product of inner dimension 1
    return torch.baddbmm(bias, left, right)


def trained_factor(weight: BatchedParameter, dtype: torch.dtype) -> Tensor:
    """The trained factor A + s U_g of every block, (B, rows of A, r)."""
    coordinate = low_rank_of(weight)
    if type(coordinate).expand is LowRankCoordinate.expand:
        return weight.context.values(coordinate, dtype)
    return _expanded_factor(coordinate, weight.context, dtype)


@tagged("directions")
def _expanded_factor(coordinate: LowRankCoordinate, context: BatchContext, dtype: torch.dtype) -> Tensor:
    return coordinate.expand(context.values(coordinate, torch.float32)).to(dtype)
