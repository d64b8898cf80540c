"""Triton: layer norm with a weight and a bias per block of rows, in one pass; sums in float32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of the longest row of a program.
MAX_ROW = 1 << 15


@triton.jit
def _norm(
    x, weight, bias, out, n, rows, weight_block, bias_block, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = row // rows
    place = tl.arange(0, SIZE)
    inside = place < n
    v = tl.load(x + row * n + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.where(inside, v - tl.sum(v) / n, 0.0)
    y = v * (1.0 / tl.sqrt(tl.sum(v * v) / n + eps))
    if WEIGHT:
        y = y * tl.load(weight + block * weight_block + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias + block * bias_block + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + place, y.to(out.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / √(variance + ε) · w + b over the last dimension of x (B, q, n), with w and b (B, n), (n,) or None."""
    x = x.contiguous()
    blocks, rows, n = x.shape
    out = torch.empty_like(x)
    vectors = [(x, 0) if v is None else (v, v.stride(0) if v.dim() == 2 else 0) for v in (weight, bias)]
    assert all(v.stride(-1) == 1 for v, _ in vectors)
    (w, w_block), (b, b_block) = vectors
    size = triton.next_power_of_2(n)
    with torch.cuda.device_of(x):
        _norm[(blocks * rows,)](
            x, w, b, out, n, rows, w_block, b_block, eps,
            WEIGHT=weight is not None, BIAS=bias is not None, SIZE=size, num_warps=4 if size <= 4096 else 8,
        )  # fmt: skip
    return out
