"""Triton: out = keep · W + scale · Z in one pass over W, Z made in registers from its key.

The numbers are those of ``counter`` and ``quantiles``, bit for bit: the same integers, the same table (multiplied by the scale
beforehand), one rounded addition. A weight is float32, or bfloat16 with the 16 bits beside it that make it float32 (``precision``).

A program makes the numbers of ``WORDS`` words, which never span two pages. What is different every step, the words of its pages and the
beginning of a parameter's stream, comes as numbers, or (``held_keys``) is read from the device, so that a launch can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.rng.counter import GOLDEN_SIGNED, PAGE, Key, page_words, signed, stream
from zotune.rng.device_keys import Source, table_of
from zotune.rng.directions import Directions
from zotune.rng.tables import BITS, LATTICE
from zotune.rng.transfer import send_list

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
def _numbers(table, word, place, SIGNS: tl.constexpr):
    """Numbers ``place`` of words, times the scale: of 64 signs to a word, or 8 normals."""
    if SIGNS:  # a byte chooses eight signs
        index = ((word >> (place >> 3 << 3)) & 0xFF) * 8 + (place & 7)
        z = tl.load(table + index)
    else:  # 16 bits choose two numbers: a sign each, and a magnitude for both. The magnitudes fit the cache next to a processor's units
        bits = (word >> (place >> 1 << 4)).to(tl.int32) & 0xFFFF
        second = (place & 1).to(tl.int32)
        magnitude = bits >> 2
        magnitude = tl.where(second == 1, (magnitude * _LATTICE) & _MAGNITUDES, magnitude)
        z = tl.load(table + magnitude)
        z = tl.where(((bits >> second) & 1) == 1, -z, z)
    return z


@triton.jit
def _read(source, residual, element, inside, HALF: tl.constexpr):
    """float32 weights, joined with the 16 bits beside them where they are bfloat16."""
    if HALF:
        bits = tl.load(source + element, mask=inside, other=0).to(tl.int32) << 16
        bits += tl.load(residual + element, mask=inside, other=0).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(source + element, mask=inside, other=0.0)
    return w


@triton.jit
def nearest(w):
    """The bits of float32 numbers as bfloat16, to nearest, ties to even; the interpreter's own conversion cuts off."""
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
def _tile(
    source, residual, out, base, table, numel, origin, keep, first,
    SIGNS: tl.constexpr, HALF: tl.constexpr, WRITE: tl.constexpr, KEEP: tl.constexpr, BOTH: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """HALF: bfloat16 and residual. WRITE: the residual of the result too. SIGNS: 64 numbers to a word instead of 8. BOTH: W − scale · Z
    as well, behind W + scale · Z. ``first``: the first word."""
    NUMBERS: tl.constexpr = 64 if SIGNS else 8
    word = first + tl.arange(0, WORDS).to(tl.int64)
    place = tl.arange(0, NUMBERS)[None, :]
    z = _numbers(table, words_of(base, origin, word)[:, None], place, SIGNS)
    element = word[:, None] * NUMBERS + place
    inside = element < numel
    w = _read(source, residual, element, inside, HALF)
    if KEEP:
        w = w * keep
    if BOTH:
        _write(out + numel, element, inside, w - z, HALF)
    w = w + z
    if HALF and WRITE:
        bits = w.to(tl.int32, bitcast=True)
        tl.store(residual + element, bits.to(tl.int16), mask=inside)
        tl.store(out + element, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
    else:
        _write(out, element, inside, w, HALF)


@triton.jit(do_not_specialize=["origin"])
def _move(
    source, residual, out, base, table, numel, origin, keep,
    SIGNS: tl.constexpr, HALF: tl.constexpr, WRITE: tl.constexpr, KEEP: tl.constexpr, BOTH: tl.constexpr, READ: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """READ: ``origin`` is read from the device."""
    if READ:  # noqa: SIM108 - the two have different types
        begin = tl.load(origin)
    else:
        begin = origin
    first = tl.program_id(0).to(tl.int64) * WORDS
    _tile(source, residual, out, base, table, numel, begin, keep, first, SIGNS, HALF, WRITE, KEEP, BOTH, WORDS)


@triton.jit
def _move_many(
    sources, residuals, numels, origins, owners, starts, base, table, keep,
    SIGNS: tl.constexpr, HALF: tl.constexpr, KEEP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Updates of many weights at once; ``owners``: whose weight a program works on, ``starts``: which program is its first."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    if HALF:
        source = tl.multiple_of(tl.load(sources + owner).to(tl.pointer_type(tl.int16)), 16)
        residual = tl.multiple_of(tl.load(residuals + owner).to(tl.pointer_type(tl.int16)), 16)
    else:
        source = tl.multiple_of(tl.load(sources + owner).to(tl.pointer_type(tl.float32)), 16)
        residual = source
    first = (program - tl.load(starts + owner)).to(tl.int64) * WORDS
    numel, origin = tl.load(numels + owner), tl.load(origins + owner)
    _tile(source, residual, source, base, table, numel, origin, keep, first, SIGNS, HALF, True, KEEP, False, WORDS)


@triton.jit(do_not_specialize=["origin"])
def _move_rows(
    source, residual, rows, out, base, table, n, origin,
    SIGNS: tl.constexpr, HALF: tl.constexpr, READ: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    if READ:  # noqa: SIM108 - the two have different types
        begin = tl.load(origin)
    else:
        begin = origin
    NUMBERS: tl.constexpr = 64 if SIGNS else 8
    here = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < n
    element = tl.load(rows + here) * n + column
    z = _numbers(table, words_of(base, begin, element // NUMBERS), element % NUMBERS, SIGNS)
    _write(out, here * n + column, inside, _read(source, residual, element, inside, HALF) + z, HALF)


# -- launching -----------------------------------------------------------------------------------------------------------------------------


def _source(directions: Directions, key: Key, scale: float, device: torch.device) -> tuple[Tensor, int, Tensor]:
    return page_words(key.seed, key.step, device), signed(stream(key)), table_of(directions, scale, device)


def _launch(
    directions: Directions,
    key: Key,
    scale: float,
    weight: Tensor,
    residual: Tensor | None,
    out: Tensor,
    keep: float = 1.0,
    write: bool = False,
    both: bool = False,
    source: Source | None = None,
) -> None:
    device, numel = weight.device, weight.numel()
    per_word = directions.source.per_word
    half = residual is not None
    raw = weight.view(torch.int16) if half else weight
    target = out.view(torch.int16) if half else out
    base, origin, table = source or _source(directions, key, scale, device)
    with torch.cuda.device_of(weight):
        _move[(triton.cdiv(numel, _TILE),)](
            raw, residual if half else raw, target, base, table, numel, origin, keep,
            SIGNS=per_word == 64, HALF=half, WRITE=write, KEEP=keep != 1.0, BOTH=both, READ=source is not None, WORDS=_TILE // per_word,
            enable_fp_fusion=False,
        )  # fmt: skip


@tagged("directions")
def perturb(
    directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, out: Tensor, source: Source | None = None
) -> None:
    """out ← W + scale · Z(key) in W's dtype; flat, contiguous tensors."""
    _launch(directions, key, scale, weight, residual, out, source=source)


@tagged("directions")
def perturb_pair(
    directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, out: Tensor, source: Source | None = None
) -> None:
    """out[0] ← W + scale · Z(key), out[1] ← W − scale · Z(key), in W's dtype; Z drawn and W read once."""
    _launch(directions, key, scale, weight, residual, out, both=True, source=source)


@tagged("directions")
def perturb_rows(
    directions: Directions,
    key: Key,
    scale: float,
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    source: Source | None = None,
) -> Tensor:
    """Rows ``rows`` (int64, (R,)) of W + scale · Z(key) for a matrix W, in W's dtype."""
    n, half, per_word = weight.shape[1], residual is not None, directions.source.per_word
    out = torch.empty(len(rows), n, dtype=weight.dtype, device=weight.device)
    raw, target = (weight.view(torch.int16), out.view(torch.int16)) if half else (weight, out)
    base, origin, table = source or _source(directions, key, scale, weight.device)
    with torch.cuda.device_of(weight):
        _move_rows[(len(rows), triton.cdiv(n, 1024))](
            raw, residual if half else raw, rows, target, base, table, n, origin,
            SIGNS=per_word == 64, HALF=half, READ=source is not None, SIZE=1024, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@tagged("directions")
def update(directions: Directions, key: Key, scale: float, weight: Tensor, residual: Tensor | None, keep: float = 1.0) -> None:
    """W ← keep · W + scale · Z(key), the residual with it."""
    _launch(directions, key, scale, weight, residual, weight, keep, write=True)


class Many:
    """Many weights of one dtype on one device that are updated by one launch; each begins at a multiple of 16 bytes.

    Args:
        weights: flat, contiguous.
        residuals: the 16 bits beside each, None for float32.
    """

    @tagged("directions")
    def __init__(self, weights: Sequence[Tensor], residuals: Sequence[Tensor] | None) -> None:
        device, self.half = weights[0].device, residuals is not None
        tiles = [triton.cdiv(weight.numel(), _TILE) for weight in weights]
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
        """Where they lie, by which it can be told that something has moved."""
        return [tensor.data_ptr() for tensor in [*weights, *(residuals or ())]]

    @tagged("directions")
    def update(self, directions: Directions, seed: int, step: int, direction: int, names: Sequence[str], scale: float, keep: float) -> None:
        """W ← keep · W + scale · Z of every weight, along a direction of a step; ``names``: under which it is drawn."""
        origins = send_list([signed(stream(Key(seed, step, direction, name))) for name in names], self.device)
        per_word = directions.source.per_word
        with torch.cuda.device_of(origins):
            _move_many[(self.tiles,)](
                self.weights, self.residuals, self.numels, origins, self.owners, self.starts, page_words(seed, step, self.device),
                table_of(directions, scale, self.device), keep,
                SIGNS=per_word == 64, HALF=self.half, KEEP=keep != 1.0, WORDS=_TILE // per_word, enable_fp_fusion=False,
            )  # fmt: skip
