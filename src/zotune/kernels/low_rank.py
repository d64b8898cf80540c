"""Triton: W + A_b Vᵀ for a few A_b in one pass over W, products and sums in float32.

``add_low_rank`` makes a weight per point, rounded to nearest: for layers with many tokens this is less traffic than passes over the output.
``fold`` adds a low-rank update to W: bfloat16 is rounded by the dither of ``precision.stochastic_round``, with the same bits, or updated
together with its residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.kernels.perturb import dither, nearest
from zotune.rng.counter import Key, page_words, signed, stream

_ROWS, _COLUMNS = 32, 128


@triton.jit(do_not_specialize=["origin"])
def _add(
    weight, residual, left, right, out, base,
    m, n, left_block, left_row, left_rank, right_row, right_rank, origin, keep,
    RANK: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, JOIN: tl.constexpr, MODE: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """HALF: bfloat16; JOIN: with a residual. MODE: 0 to nearest, 1 by dither, 2 writing the residual."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < m)[:, None] & (column < n)[None, :]
    element = row[:, None] * n + column[None, :]
    if HALF:
        bits = tl.load(weight + element, mask=inside, other=0).to(tl.int32) << 16
        if JOIN:
            bits += tl.load(residual + element, mask=inside, other=0).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(weight + element, mask=inside, other=0.0)
    if KEEP:
        w = w * keep
    for block in tl.static_range(BLOCKS):
        total = w
        for k in tl.static_range(RANK):
            a = tl.load(left + block * left_block + row * left_row + k * left_rank, mask=row < m, other=0.0)
            v = tl.load(right + column * right_row + k * right_rank, mask=column < n, other=0.0)
            total = total + a[:, None] * v[None, :]
        place = element + block * m * n
        if not HALF:
            tl.store(out + place, total, mask=inside)
        else:
            bits = total.to(tl.int32, bitcast=True)
            if MODE == 0:
                tl.store(out + place, nearest(total), mask=inside)
            elif MODE == 1:
                tl.store(out + place, ((bits + dither(base, origin, element)) >> 16).to(tl.int16), mask=inside)
            else:
                tl.store(residual + element, bits.to(tl.int16), mask=inside)
                tl.store(out + place, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)


def _launch(
    weight: Tensor, residual: Tensor | None, left: Tensor, right: Tensor, out: Tensor, keep: float, mode: int, key: Key | None
) -> None:
    (m, n), (blocks, _, rank), half = weight.shape, left.shape, weight.dtype == torch.bfloat16
    raw, target = (weight.view(torch.int16), out.view(torch.int16)) if half else (weight, out)
    base = page_words(key.seed, key.step, weight.device) if key is not None else raw
    origin = signed(stream(key)) if key is not None else 0
    grid = (triton.cdiv(m, _ROWS), triton.cdiv(n, _COLUMNS))
    with torch.cuda.device_of(weight):
        _add[grid](
            raw, residual if residual is not None else raw, left, right, target, base,
            m, n, left.stride(0), left.stride(1), left.stride(2), right.stride(0), right.stride(1), origin, keep,
            RANK=rank, BLOCKS=blocks, HALF=half, JOIN=residual is not None, MODE=mode, KEEP=keep != 1.0, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip


def add_low_rank(weight: Tensor, residual: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """W + left_b · rightᵀ in W's dtype, (B, m, n), for W (m, n), left (B, m, r) and right (n, r) float32."""
    out = torch.empty(left.shape[0], *weight.shape, dtype=weight.dtype, device=weight.device)
    _launch(weight, residual, left, right, out, 1.0, 0, None)
    return out


def fold(weight: Tensor, residual: Tensor | None, left: Tensor, right: Tensor, keep: float, rounding: Key) -> None:
    """W ← keep · W + left · rightᵀ; left (m, r), right (n, r) float32. A bfloat16 W without residual rounds by ``rounding``'s dither."""
    mode = 2 if residual is not None else 1
    _launch(weight, residual, left.unsqueeze(0), right, weight, keep, mode, rounding if weight.dtype == torch.bfloat16 else None)


@triton.jit
def _outer(
    bias, left, right, out, rows, m, bias_block, left_block, left_row, left_rank, right_block, right_rank, right_column,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(bias + block * bias_block + column, mask=column < m, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(RANK):
        a = tl.load(left + block * left_block + row * left_row + k * left_rank, mask=row < rows, other=0.0).to(tl.float32)
        b = tl.load(right + block * right_block + k * right_rank + column * right_column, mask=column < m, other=0.0).to(tl.float32)
        total = total + a[:, None] * b[None, :]
    place = (block * rows + row[:, None]) * m + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < m)[None, :])


def outer(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """b_B + left_B · right_B, (B, q, m), in left's dtype, for left (B, q, r), right (B, r, m) and b (B, 1, m) or (m,): written once."""
    (blocks, rows, rank), m = left.shape, right.shape[2]
    out = torch.empty(blocks, rows, m, dtype=left.dtype, device=left.device)
    assert bias.stride(-1) == 1
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(m, _COLUMNS), blocks)
    with torch.cuda.device_of(left):
        _outer[grid](
            bias, left, right, out, rows, m, bias.stride(0) if bias.dim() == 3 else 0, *left.stride(), *right.stride(),
            RANK=rank, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return out
