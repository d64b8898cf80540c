"""``nn.LayerNorm`` and ``nn.RMSNorm``: rows normalized, times a vector w, plus a vector b. Their vectors move in full space.

- Batched: a vector a block; a fused kernel on accelerators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.forward.batched import BatchedParameter, by_block, context_of, require_batchable
from zotune.forward.layers.rule import Example, Function, LayerRule, register
from zotune.io.memory_tags import tagged
from zotune.kernels import layer_norm_kernels


def affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """rows (B, q, n) · w + b with a vector a block, or the same one for all."""
    w, b = (t.full().unsqueeze(1) if isinstance(t, BatchedParameter) else t for t in (weight, bias))
    if w is None:
        return rows if b is None else rows.add_(b)
    return rows.mul_(w) if b is None else torch.addcmul(b, rows, w)


@tagged("activations")
def batched_layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm(x) over the last dimension, with a point a block of rows."""
    require_batchable(x, several_dimensions=len(normalized_shape) != 1)
    context = context_of(weight, bias)
    x = context.spread(x, 1)
    kernel = layer_norm_kernels(x)
    if kernel is not None:
        vectors = (vector.full() if isinstance(vector, BatchedParameter) else vector for vector in (weight, bias))
        return kernel.layer_norm(by_block(x, context, x.shape[-1]), *vectors, eps).view(x.shape)
    rows = by_block(F.layer_norm(x, normalized_shape, None, None, eps), context, x.shape[-1])
    return affine(rows, weight, bias).view(x.shape)


@tagged("activations")
def batched_rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMSNorm(x) over the last dimension, with a point a block of rows."""
    require_batchable(x, several_dimensions=len(normalized_shape) != 1)
    context = context_of(weight)
    x = context.spread(x, 1)
    return affine(by_block(F.rms_norm(x, normalized_shape, None, eps), context, x.shape[-1]), weight, None).view(x.shape)


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
