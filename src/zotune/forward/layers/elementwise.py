"""Vectors that a model's own Python multiplies with rows or adds to them: norms written out, scales, offsets.

- Batched: a vector a block. A number times or plus such a vector is a batched vector again, and so is one in another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zotune.errors import NotBatchableError
from zotune.forward.batched import BatchedParameter, by_block
from zotune.forward.layers.rule import Example, Function, LayerRule, register
from zotune.io.memory_tags import tagged


def _commuting(operation: Callable[[Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    """A commuting operation of a vector with rows, or with a number (which gives a batched vector again)."""

    @tagged("activations")
    def elementwise(one: Any, other: Any) -> Tensor:
        vector, x = (one, other) if isinstance(one, BatchedParameter) else (other, one)
        if vector.plain.dim() != 1 or isinstance(x, BatchedParameter):
            raise NotBatchableError(f"the model computes with {vector.coordinate.name}, which has no batched form")
        if not isinstance(x, Tensor) or x.dim() == 0:
            return BatchedParameter.of(operation(vector.plain, x), vector.coordinate, vector.context, operation(vector.full(), x))
        rows = by_block(x, vector.context, vector.plain.shape[0])
        lead = x.shape if x.shape[0] != 1 else (vector.context.lead, *x.shape[1:])
        return operation(rows, vector.full().unsqueeze(1)).view(lead)

    return elementwise


def _cast(method: str) -> Callable[..., Tensor]:
    @tagged("activations")
    def elementwise(vector: BatchedParameter, *args: Any, **kwargs: Any) -> Tensor:
        plain = getattr(vector.plain, method)(*args, **kwargs)
        if plain is vector.plain:
            return vector
        if plain.dim() != 1:
            raise NotBatchableError(f"the model converts {vector.coordinate.name} to {plain.dtype}")
        return BatchedParameter.of(plain, vector.coordinate, vector.context, vector.full().to(plain.dtype))

    return elementwise


class Elementwise(LayerRule):
    """No module type of its own: what a forward does with a vector."""

    batched: ClassVar[Mapping[str, Function]] = {
        **dict.fromkeys(("mul", "__mul__", "__rmul__"), _commuting(torch.mul)),
        **dict.fromkeys(("add", "__add__", "__radd__"), _commuting(torch.add)),
        **{method: _cast(method) for method in ("to", "float", "half", "bfloat16", "type_as")},
    }

    def examples(self) -> Iterable[Example]:
        yield Example("a norm written out", _WrittenNorm, lambda rows: torch.randn(rows, 3, 80))


class _WrittenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(80)), nn.Parameter(torch.randn(80))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return ((1.0 + self.weight.float()) * rows + self.bias).to(x.dtype)


register(Elementwise())
