"""``nn.LayerNorm`` and ``nn.RMSNorm``: normalized rows, times a vector w, plus a vector b. Both vectors are trained in full space.

- Batched: a vector per block; a fused kernel on accelerators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.forward.batched import BatchedParameter, context_of, require_batchable, vector_by_block
from zotune.forward.layers.rule import Example, Function, LayerRule, register
from zotune.kernels import layer_norm_kernels


def affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """rows (B, q, n) · w + b, with a vector per block or one for all."""
    w, b = vector_by_block(weight), vector_by_block(bias)
    if w is None:
        return rows if b is None else rows.add_(b)
    return rows.mul_(w) if b is None else torch.addcmul(b, rows, w)


def batched_layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm(x) over the last dimension, with a point per block of rows."""
    require_batchable(x, len(normalized_shape) != 1)
    context = context_of(weight, bias)
    x = context.expand_rows(x, 1)
    kernel = layer_norm_kernels(x)
    if kernel is not None:
        vectors = (vector.block_values() if isinstance(vector, BatchedParameter) else vector for vector in (weight, bias))
        return kernel.layer_norm(context.by_block(x, x.shape[-1]), *vectors, eps).view(x.shape)  # type: ignore[no-any-return]
    rows = F.layer_norm(x, normalized_shape, None, None, eps).reshape(context.blocks, -1, x.shape[-1])
    return affine(rows, weight, bias).view(x.shape)


def batched_rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMSNorm(x) over the last dimension, with a point per block of rows."""
    require_batchable(x, len(normalized_shape) != 1)
    context = context_of(weight)
    x = context.expand_rows(x, 1)
    rows = F.rms_norm(x, normalized_shape, None, eps).reshape(context.blocks, -1, x.shape[-1])
    return affine(rows, weight, None).view(x.shape)


class Norms(LayerRule):
    """``nn.LayerNorm`` and ``nn.RMSNorm`` over the last dimension."""

    batched: ClassVar[Mapping[str, Function]] = {"layer_norm": batched_layer_norm, "rms_norm": batched_rms_norm}

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.LayerNorm, nn.RMSNorm))

    def examples(self) -> Iterable[Example]:
        inputs = lambda rows: torch.randn(rows, 3, 80)  # noqa: E731
        yield Example("layer norm", lambda: nn.LayerNorm(80), inputs)
        yield Example("layer norm, bias=False", lambda: nn.LayerNorm(80, bias=False), inputs)
        yield Example("rms norm", lambda: nn.RMSNorm(80), inputs)


register(Norms())
