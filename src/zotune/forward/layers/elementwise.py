"""Vectors that a model's own Python code multiplies with rows or adds to them: norms written out, scales, offsets.

- Batched: a vector per block. A number times or plus a vector, and a vector in another dtype, are batched vectors again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zotune.errors import NotBatchableError
from zotune.forward.batched import BatchedParameter
from zotune.forward.layers.rule import Example, Function, LayerRule, register


def _commuting(operation: Callable[[Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    """A commuting operation of a vector, or of a scalar, with rows, or with a number (the result is a batched vector)."""

    def elementwise(one: Any, other: Any) -> Tensor:
        vector, x = (one, other) if isinstance(one, BatchedParameter) else (other, one)
        context, coordinate = vector.context, vector.coordinate
        if vector.stored.dim() > 1 or isinstance(x, BatchedParameter):
            raise NotBatchableError(f"the model computes with {coordinate.name}, which has no batched form")
        if not isinstance(x, Tensor) or x.dim() == 0:
            return BatchedParameter.of(operation(vector.stored, x), coordinate, context, operation(vector.block_values(), x))
        shape = x.shape if x.shape[0] != 1 else (context.input_rows, *x.shape[1:])
        scalar = vector.stored.dim() == 0
        rows = context.by_block(x.unsqueeze(-1), 1) if scalar else context.by_block(x, vector.stored.shape[0])
        return operation(rows, vector.block_values().view(context.blocks, 1, -1)).view(shape)

    return elementwise


def _cast(method: str) -> Callable[..., Tensor]:
    def elementwise(vector: BatchedParameter, *args: Any, **kwargs: Any) -> Tensor:
        stored = getattr(vector.stored, method)(*args, **kwargs)
        if stored is vector.stored:
            return vector
        if stored.dim() > 1:
            raise NotBatchableError(f"the model converts {vector.coordinate.name} to {stored.dtype}")
        return BatchedParameter.of(stored, vector.coordinate, vector.context, vector.block_values().to(stored.dtype))

    return elementwise


class Elementwise(LayerRule):
    """Owns no module type; covers what a forward does with a vector."""

    batched: ClassVar[Mapping[str, Function]] = {
        **dict.fromkeys(("mul", "__mul__", "__rmul__"), _commuting(torch.mul)),
        **dict.fromkeys(("add", "__add__", "__radd__"), _commuting(torch.add)),
        **{method: _cast(method) for method in ("to", "float", "half", "bfloat16", "type_as")},
    }

    def examples(self) -> Iterable[Example]:
        yield Example("a norm written out", _WrittenNorm, lambda rows: torch.randn(rows, 3, 80))
        yield Example("scalars", _Scalars, lambda rows: torch.randn(rows, 3, 80))


class _WrittenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(80)), nn.Parameter(torch.randn(80))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return ((1.0 + self.weight.float()) * rows + self.bias).to(x.dtype)


class _Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + self.scale) + (x.mean(dim=(1, 2)) * self.scale + self.shift).view(-1, 1, 1)


register(Elementwise())
