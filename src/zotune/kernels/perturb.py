"""Triton: out = keep · W + scale · Z in one pass over W, Z made in registers from its key.

Bit for bit equal to ``rng.counter`` and ``rng.tables``: the same integers, the same table (multiplied by the scale beforehand), one
rounded addition. A weight is float32, or bfloat16 with a residual, the lower 16 bits of the float32 value (``weights.precision``), or
bfloat16 alone: its updates are rounded by the dither of ``stochastic_round``, with the same bits.

A program generates the elements of ``WORDS`` words, which never span two pages. What differs between steps, the page words and the origin
of a parameter's stream, is an argument, or is read from device memory (``rng.device_keys``) so that a launch can be captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.rng.counter import GOLDEN_SIGNED, PAGE, Key, page_words, signed, stream
from zotune.rng.device_keys import KeySource, lookup_table
from zotune.rng.directions import Directions
from zotune.rng.tables import BITS, LATTICE
from zotune.rng.transfer import send_list

#: Elements of a program.
TILE = 2048
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
    """Words number ``word`` of the stream ``origin``, int64."""
    m = (word >> _PAGE_BITS) * _GOLDEN + origin
    m = _shift_xor(m, 30) * _FIRST
    m = _shift_xor(m, 27) * _SECOND
    m = _shift_xor(m, 31) | 1
    x = tl.load(base + (word & _IN_PAGE)) * m
    return (x ^ (x >> 32)) * _GOLDEN


@triton.jit
def _elements(table, word, place, SIGNS: tl.constexpr):
    """Elements ``place`` of words, times the scale: 64 signs per word, or 8 normals."""
    if SIGNS:  # a byte selects eight signs
        index = ((word >> (place >> 3 << 3)) & 0xFF) * 8 + (place & 7)
        z = tl.load(table + index)
    else:  # 16 bits select two normals: a sign each, and one index for both magnitudes, whose table fits into the L1 cache
        bits = (word >> (place >> 1 << 4)).to(tl.int32) & 0xFFFF
        second = (place & 1).to(tl.int32)
        magnitude = bits >> 2
        magnitude = tl.where(second == 1, (magnitude * _LATTICE) & _MAGNITUDES, magnitude)
        z = tl.load(table + magnitude)
        z = tl.where(((bits >> second) & 1) == 1, -z, z)
    return z


@triton.jit
def _read(source, residual, element, inside, HALF: tl.constexpr, JOIN: tl.constexpr):
    """float32 weights; HALF: of bfloat16 weights, JOIN: and their residuals."""
    if HALF:
        bits = tl.load(source + element, mask=inside, other=0).to(tl.int32) << 16
        if JOIN:
            bits += tl.load(residual + element, mask=inside, other=0).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(source + element, mask=inside, other=0.0)
    return w


@triton.jit
def nearest(w):
    """float32 values as the bits of bfloat16, to nearest, ties to even; the interpreter's own conversion truncates."""
    bits = w.to(tl.int32, bitcast=True)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(w == w, even, 0x7FC0).to(tl.int16)


@triton.jit
def _write(out, element, inside, w, HALF: tl.constexpr):
    if HALF:
        tl.store(out + element, nearest(w), mask=inside)
    else:
        tl.store(out + element, w, mask=inside)


@triton.jit
def dither(base, origin, element):
    """The 16 random bits of stochastic rounding of elements, int32: half of a word each."""
    word = words_of(base, origin, element >> 1)
    return ((word >> ((element & 1) << 5)) & 0xFFFF).to(tl.int32)


@triton.jit
def _tile(
    source, residual, out, base, table, numel, origin, rounding, keep, first,
    SIGNS: tl.constexpr, HALF: tl.constexpr, JOIN: tl.constexpr, WRITE: tl.constexpr, KEEP: tl.constexpr, BOTH: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """HALF: bfloat16; JOIN: with a residual. WRITE: an update, which writes the residual too, or rounds by the dither of the stream
    ``rounding``. SIGNS: 64 elements per word instead of 8. BOTH: also W − scale · Z, after W + scale · Z. ``first``: the first word."""
    ELEMENTS: tl.constexpr = 64 if SIGNS else 8
    word = first + tl.arange(0, WORDS).to(tl.int64)
    place = tl.arange(0, ELEMENTS)[None, :]
    z = _elements(table, words_of(base, origin, word)[:, None], place, SIGNS)
    element = word[:, None] * ELEMENTS + place
    inside = element < numel
    w = _read(source, residual, element, inside, HALF, JOIN)
    if KEEP:
        w = w * keep
    if BOTH:
        _write(out + numel, element, inside, w - z, HALF)
    w = w + z
    if HALF and WRITE:
        bits = w.to(tl.int32, bitcast=True)
        if JOIN:
            tl.store(residual + element, bits.to(tl.int16), mask=inside)
            tl.store(out + element, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        else:
            tl.store(out + element, ((bits + dither(base, rounding, element)) >> 16).to(tl.int16), mask=inside)
    else:
        _write(out, element, inside, w, HALF)


@triton.jit(do_not_specialize=["origin", "rounding"])
def _perturb(
    source, residual, out, base, table, numel, origin, rounding, keep,
    SIGNS: tl.constexpr, HALF: tl.constexpr, JOIN: tl.constexpr, WRITE: tl.constexpr, KEEP: tl.constexpr, BOTH: tl.constexpr,
    READ: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """READ: ``origin`` is in device memory."""
    if READ:  # noqa: SIM108 - the two have different types
        begin = tl.load(origin)
    else:
        begin = origin
    first = tl.program_id(0).to(tl.int64) * WORDS
    _tile(source, residual, out, base, table, numel, begin, rounding, keep, first, SIGNS, HALF, JOIN, WRITE, KEEP, BOTH, WORDS)


@triton.jit
def _perturb_many(
    sources, residuals, numels, origins, roundings, owners, starts, base, table, keep,
    SIGNS: tl.constexpr, HALF: tl.constexpr, JOIN: tl.constexpr, KEEP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Updates of many weights at once; ``owners``: index of a program's weight, ``starts``: first program of each weight."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    if HALF:
        source = tl.multiple_of(tl.load(sources + owner).to(tl.pointer_type(tl.int16)), 16)
        residual = source
        if JOIN:
            residual = tl.multiple_of(tl.load(residuals + owner).to(tl.pointer_type(tl.int16)), 16)
    else:
        source = tl.multiple_of(tl.load(sources + owner).to(tl.pointer_type(tl.float32)), 16)
        residual = source
    first = (program - tl.load(starts + owner)).to(tl.int64) * WORDS
    numel, origin, rounding = tl.load(numels + owner), tl.load(origins + owner), tl.load(roundings + owner)
    _tile(source, residual, source, base, table, numel, origin, rounding, keep, first, SIGNS, HALF, JOIN, True, KEEP, False, WORDS)


@triton.jit(do_not_specialize=["origin"])
def _perturb_rows(
    source, residual, rows, out, base, table, n, origin,
    SIGNS: tl.constexpr, HALF: tl.constexpr, JOIN: tl.constexpr, READ: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    if READ:  # noqa: SIM108 - the two have different types
        begin = tl.load(origin)
    else:
        begin = origin
    ELEMENTS: tl.constexpr = 64 if SIGNS else 8
    here = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < n
    element = tl.load(rows + here) * n + column
    z = _elements(table, words_of(base, begin, element // ELEMENTS), element % ELEMENTS, SIGNS)
    _write(out, here * n + column, inside, _read(source, residual, element, inside, HALF, JOIN) + z, HALF)


# -- launching -----------------------------------------------------------------------------------------------------------------------------


def _source(directions: Directions, key: Key, scale: float, device: torch.device) -> tuple[Tensor, int, Tensor]:
    return page_words(key.seed, key.step, device), signed(stream(key)), lookup_table(directions, scale, device)


def _launch(
    directions: Directions,
    key: Key,
    scale: float,
    weight: Tensor,
    residual: Tensor | None,
    out: Tensor,
    keep: float = 1.0,
    rounding: Key | None = None,
    write: bool = False,
    both: bool = False,
    source: KeySource | None = None,
) -> None:
    device, numel = weight.device, weight.numel()
    per_word = directions.source.per_word
    half = weight.dtype == torch.bfloat16
    raw = weight.view(torch.int16) if half else weight
    target = out.view(torch.int16) if half else out
    base, origin, table = source or _source(directions, key, scale, device)
    dithered = 0 if rounding is None else signed(stream(rounding))
    with torch.cuda.device_of(weight):
        _perturb[(triton.cdiv(numel, TILE),)](
            raw, raw if residual is None else residual, target, base, table, numel, origin, dithered, keep,
            SIGNS=per_word == 64, HALF=half, JOIN=residual is not None, WRITE=write, KEEP=keep != 1.0, BOTH=both,
            READ=source is not None, WORDS=TILE // per_word, enable_fp_fusion=False,
        )  # fmt: skip


def perturb(
    directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, out: Tensor, source: KeySource | None = None
) -> None:
    """out ← W + scale · Z(key) in W's dtype; flat, contiguous tensors."""
    _launch(directions, key, scale, weight, residual, out, source=source)


def perturb_pair(
    directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, out: Tensor, source: KeySource | None = None
) -> None:
    """out[0] ← W + scale · Z(key), out[1] ← W − scale · Z(key), in W's dtype, in one pass."""
    _launch(directions, key, scale, weight, residual, out, both=True, source=source)


def perturb_rows(
    directions: Directions,
    key: Key,
    scale: float,
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    source: KeySource | None = None,
) -> Tensor:
    """Rows ``rows`` (int64, (R,)) of W + scale · Z(key) for a matrix W, in W's dtype."""
    n, half, per_word = weight.shape[1], weight.dtype == torch.bfloat16, directions.source.per_word
    out = torch.empty(len(rows), n, dtype=weight.dtype, device=weight.device)
    raw, target = (weight.view(torch.int16), out.view(torch.int16)) if half else (weight, out)
    base, origin, table = source or _source(directions, key, scale, weight.device)
    with torch.cuda.device_of(weight):
        _perturb_rows[(len(rows), triton.cdiv(n, 1024))](
            raw, raw if residual is None else residual, rows, target, base, table, n, origin,
            SIGNS=per_word == 64, HALF=half, JOIN=residual is not None, READ=source is not None, SIZE=1024, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def update(directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, keep: float, rounding: Key) -> None:
    """W ← keep · W + scale · Z(key), with its residual; bfloat16 without one rounds by the dither of ``rounding``, a key of the step."""
    _launch(directions, key, scale, weight, residual, weight, keep, rounding, write=True)


class MultiTensorUpdate:
    """Weights of one dtype on one device, updated by one launch; each starts at a multiple of 16 bytes.

    Args:
        weights: flat, contiguous.
        residuals: of each; None: they have none.
    """

    def __init__(self, weights: Sequence[Tensor], residuals: Sequence[Tensor] | None) -> None:
        device, self.half, self.join = weights[0].device, weights[0].dtype == torch.bfloat16, residuals is not None
        tiles = [triton.cdiv(weight.numel(), TILE) for weight in weights]
        self.places = self.places_of(weights, residuals)
        self.weights = send_list([weight.data_ptr() for weight in weights], device)
        self.residuals = send_list([one.data_ptr() for one in residuals], device) if residuals is not None else self.weights
        self.numels = send_list([weight.numel() for weight in weights], device)
        counts = torch.tensor(tiles)
        self.owners = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), counts).to(device)
        self.starts = (counts.cumsum(0) - counts).int().to(device)
        self.device, self.tiles = weights[0].device, sum(tiles)

    @staticmethod
    def places_of(weights: Sequence[Tensor], residuals: Sequence[Tensor] | None) -> list[int]:
        """Their addresses, to notice that a tensor was reallocated."""
        return [tensor.data_ptr() for tensor in [*weights, *(residuals or ())]]

    def update(self, directions: Directions, keys: Sequence[Key], roundings: Sequence[Key], scale: float, keep: float) -> None:
        """W ← keep · W + scale · Z of every weight, along a direction of a step; keys of each, as in :func:`update`."""
        (seed, step, *_), origins = keys[0], send_list([signed(stream(key)) for key in keys], self.device)
        rounding = send_list([signed(stream(key)) for key in roundings], self.device) if self.half and not self.join else origins
        per_word = directions.source.per_word
        with torch.cuda.device_of(origins):
            _perturb_many[(self.tiles,)](
                self.weights, self.residuals, self.numels, origins, rounding, self.owners, self.starts,
                page_words(seed, step, self.device), lookup_table(directions, scale, self.device), keep,
                SIGNS=per_word == 64, HALF=self.half, JOIN=self.join, KEEP=keep != 1.0, WORDS=TILE // per_word, enable_fp_fusion=False,
            )  # fmt: skip
