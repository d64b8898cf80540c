"""Triton: out = keep · W + scale · Z in one pass over W, Z made in registers from its key.

The numbers are those of ``counter`` and ``quantiles``, bit for bit: the same integers, the same table (multiplied by the scale
beforehand), one rounded addition. A weight is float32, or bfloat16 with the 16 bits beside it that make it float32 (``precision``).

A program makes the numbers of ``WORDS`` words, which never span two pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.counter import GOLDEN_SIGNED, PAGE, Key, page_words, signed, stream
from zotune.directions import Directions
from zotune.quantiles import BITS, LATTICE, scaled_magnitudes, scaled_signs

#: Numbers to a program.
_TILE = 2048
_PAGE_BITS = tl.constexpr(PAGE.bit_length() - 1)
_IN_PAGE = tl.constexpr(PAGE - 1)
_LATTICE = tl.constexpr(LATTICE)
_MAGNITUDES = tl.constexpr((1 << BITS) - 1)
_GOLDEN = tl.constexpr(GOLDEN_SIGNED)
_FIRST = tl.constexpr(signed(0xBF58476D1CE4E5B9))
_SECOND = tl.constexpr(signed(0x94D049BB133111EB))


@triton.jit
def _shift_xor(x, BITS: tl.constexpr):
    """x ⊕ (x ≫ BITS), the shift without the sign."""
    return x ^ ((x >> BITS) & ((1 << (64 - BITS)) - 1))


@triton.jit
def words_of(base, origin, word):
    """The words of the stream ``origin`` with the numbers ``word``, int64."""
    m = (word >> _PAGE_BITS) * _GOLDEN + origin
    m = _shift_xor(m, 30) * _FIRST
    m = _shift_xor(m, 27) * _SECOND
    m = _shift_xor(m, 31) | 1
    x = tl.load(base + (word & _IN_PAGE)) * m
    return (x ^ (x >> 32)) * _GOLDEN


@triton.jit
def nearest(w):
    """The bits of float32 numbers as bfloat16, to nearest, ties to even; the interpreter's own conversion cuts off."""
    bits = w.to(tl.int32, bitcast=True)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(w == w, even, 0x7FC0).to(tl.int16)


@triton.jit(do_not_specialize=["origin"])
def _move(
    source,
    residual,
    out,
    residual_out,
    base,
    table,
    numel,
    origin,
    keep,
    SIGNS: tl.constexpr,
    HALF: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
    BOTH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """HALF: bfloat16 and residual. WRITE: the residual of the result too. SIGNS: 64 numbers to a word instead of 8. BOTH: W − scale · Z
    as well, behind W + scale · Z."""
    NUMBERS: tl.constexpr = 64 if SIGNS else 8
    first = tl.program_id(0).to(tl.int64) * WORDS
    word = words_of(base, origin, first + tl.arange(0, WORDS).to(tl.int64))
    place = tl.arange(0, NUMBERS)
    if SIGNS:  # a byte chooses eight signs
        index = ((word[:, None] >> (place >> 3 << 3)[None, :]) & 0xFF) * 8 + (place & 7)[None, :]
        z = tl.load(table + index)
    else:  # 16 bits choose two numbers: a sign each, and a magnitude for both. The magnitudes fit the cache next to a processor's units
        bits = (word[:, None] >> (place >> 1 << 4)[None, :]).to(tl.int32) & 0xFFFF
        second = (place & 1)[None, :]
        magnitude = bits >> 2
        magnitude = tl.where(second == 1, (magnitude * _LATTICE) & _MAGNITUDES, magnitude)
        z = tl.load(table + magnitude)
        z = tl.where(((bits >> second) & 1) == 1, -z, z)
    element = (first + tl.arange(0, WORDS).to(tl.int64))[:, None] * NUMBERS + place[None, :]
    inside = element < numel
    if HALF:
        bits = tl.load(source + element, mask=inside, other=0).to(tl.int32) << 16
        bits += tl.load(residual + element, mask=inside, other=0).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(source + element, mask=inside, other=0.0)
    if KEEP:
        w = w * keep
    if BOTH:
        other = w - z
        if HALF:
            tl.store(out + numel + element, nearest(other), mask=inside)
        else:
            tl.store(out + numel + element, other, mask=inside)
    w = w + z
    if not HALF:
        tl.store(out + element, w, mask=inside)
    elif WRITE:
        bits = w.to(tl.int32, bitcast=True)
        tl.store(residual_out + element, bits.to(tl.int16), mask=inside)
        tl.store(out + element, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(out + element, nearest(w), mask=inside)


def _launch(
    directions: Directions,
    key: Key,
    scale: float,
    source: Tensor,
    residual: Tensor | None,
    out: Tensor,
    keep: float = 1.0,
    write: bool = False,
    both: bool = False,
) -> None:
    device, numel = source.device, source.numel()
    per_word = directions.source.per_word
    words = _TILE // per_word
    half = residual is not None
    raw = source.view(torch.int16) if half else source
    target = out.view(torch.int16) if half else out
    table = scaled_signs(scale, device) if per_word == 64 else scaled_magnitudes(scale, device)
    beside = residual if residual is not None else source
    with torch.cuda.device_of(source):
        _move[(triton.cdiv(numel, _TILE),)](
            raw, beside, target, beside, page_words(key.seed, key.step, device), table, numel, signed(stream(key)), keep,
            SIGNS=per_word == 64, HALF=half, WRITE=write, KEEP=keep != 1.0, BOTH=both, WORDS=words, enable_fp_fusion=False,
        )  # fmt: skip


def perturb(directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """out ← W + scale · Z(key) in W's dtype; flat, contiguous tensors."""
    _launch(directions, key, scale, weight, residual, out)


def perturb_both(directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """out[0] ← W + scale · Z(key), out[1] ← W − scale · Z(key), in W's dtype; Z drawn and W read once."""
    _launch(directions, key, scale, weight, residual, out, both=True)


def update(directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, keep: float = 1.0) -> None:
    """W ← keep · W + scale · Z(key), the residual with it."""
    _launch(directions, key, scale, weight, residual, weight, keep, write=True)
