"""Counter-based random words: word i of a stream is a function of (the stream's key, i), computed with integers.

There is no state, so any part of a stream can be generated alone, in blocks of any size, by any thread, in any order. 64-bit integer
arithmetic is the same on every device, so a CPU and a GPU generate the same words.

With i = 2¹⁴ p + j ("word j of page p"), all arithmetic modulo 2⁶⁴:

- B_j is the splitmix64 sequence of a hash of (run seed, step): 2¹⁴ words, made once per step and shared by its streams;
- M_p is an odd number: two splitmix64 finalizers of a hash of the whole key, one for the direction and one for the page;
- x = B_j · M_p,  y = x ⊕ (x ≫ 32) with the arithmetic shift (torch has no logical one),  word = y · 0x9E3779B97F4A7C15.

The product is a multiplicative hash of two random words: pairs are practically independent in their upper halves, the fold copies the upper
half to the lower one, the last product mixes it up again. That is four operations for 64 bits; Philox takes 60 of torch's integer
operations, more than the rest of a step. The fold loses one bit of 64: two x in 2⁶⁴ share a y.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zotune.io.caches import tensor_cache
from zotune.io.execution import current
from zotune.io.memory_tags import tagged
from zotune.rng.transfer import send, send_list

#: Words to a page.
PAGE = 1 << 14
_MASK = (1 << 64) - 1


class Key(NamedTuple):
    """The key of a random tensor: (run seed, step, direction index k, parameter name, purpose)."""

    seed: int
    step: int
    direction: int
    name: str
    purpose: str = "direction"


def signed(x: int) -> int:
    """x modulo 2⁶⁴ as the int64 with the same bits."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
#: The constants as the int64 that torch and the kernels compute with.
GOLDEN_SIGNED, FIRST_SIGNED, SECOND_SIGNED = signed(GOLDEN), signed(_FIRST), signed(_SECOND)
#: The same as tensors: converting a number costs torch as much as an operation on a small tensor.
_GOLDEN_TENSOR, _FOLD_TENSOR = torch.tensor(GOLDEN_SIGNED), torch.tensor(32)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator_seed(key: Key) -> int:
    """A 63-bit seed for a generator of torch's, BLAKE2b of the key."""
    return _hash(f"{key.seed}|{key.step}|{key.direction}|0|{key.purpose}|{key.name}") >> 1


def mix64(x: int) -> int:
    """splitmix64's finalizer, a bijection of the 64-bit numbers (Steele, Lea and Flood, OOPSLA 2014)."""
    x &= _MASK
    x = (x ^ (x >> 30)) * _FIRST & _MASK
    x = (x ^ (x >> 27)) * _SECOND & _MASK
    return x ^ (x >> 31)


def mixed(x: Tensor) -> Tensor:
    """:func:`mix64` of an int64 tensor, in place."""
    for shift, factor in ((30, FIRST_SIGNED), (27, SECOND_SIGNED), (31, 1)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= factor
    return x


@tensor_cache(maxsize=4096)
def _origin(seed: int, step: int, name: str, purpose: str) -> int:
    return _hash(f"stream|{seed}|{step}|{purpose}|{name}")


def stream(key: Key, direction: int | None = None) -> int:
    """The 64-bit origin of the pages of a key, or of the same key with another ``direction``."""
    return mix64(_origin(key.seed, key.step, key.name, key.purpose) + (key.direction if direction is None else direction) * GOLDEN)


def multiplier(origin: int, page: int) -> int:
    """M of a page of the stream ``origin``, as int64."""
    return signed(mix64(origin + page * GOLDEN) | 1)


def multipliers(origin: int, pages: Tensor) -> Tensor:
    """:func:`multiplier` of an int64 tensor of pages."""
    return mixed((pages * GOLDEN_SIGNED).add_(signed(origin))).bitwise_or_(1)


#: Words that are enough for most steps; a whole page takes as long as the directions of several small parameters.
_FRONT = PAGE >> 3


@tensor_cache(maxsize=8)
def _page_words(seed: int, step: int, device: torch.device, count: int) -> Tensor:
    with torch.inference_mode(False):
        start = signed(_hash(f"page|{seed}|{step}"))
        return mixed(torch.arange(1, count + 1, device=device).mul_(GOLDEN_SIGNED).add_(start))


def page_words(seed: int, step: int, device: torch.device, count: int = PAGE) -> Tensor:
    """B of a step, the first ``count`` of them at least: int64, flat, at most (PAGE,)."""
    return _page_words(seed, step, device, _FRONT if count <= _FRONT else PAGE)


def _finish(x: Tensor, spare: Tensor) -> Tensor:
    torch.bitwise_right_shift(x, 32, out=spare)
    return x.bitwise_xor_(spare).mul_(GOLDEN_SIGNED)


def words(key: Key, first: int, count: int, out: Tensor, spare: Tensor) -> Tensor:
    """Words ``first`` to ``first + count - 1`` of a stream, written to ``out``, int64, (count,); ``spare``: scratch memory like it."""
    page, start = divmod(first, PAGE)
    if start + count > 2 * PAGE and out.device.type != "cpu":  # few, large launches
        return out.copy_(words_at(key, torch.arange(first, first + count, device=out.device)))
    base, origin = page_words(key.seed, key.step, out.device), stream(key)
    if count == PAGE and not start:
        torch.mul(base, multiplier(origin, page), out=out)
        return _finish(out, spare)
    done = 0
    while done < count:
        size = min(count - done, PAGE - start)
        torch.mul(base[start : start + size], multiplier(origin, page), out=out[done : done + size])
        done, page, start = done + size, page + 1, 0
        if current().first_block_only:  # a dry run: the other pages allocate nothing
            break
    return _finish(out, spare)


def words_many(key: Key, directions: int, count: int, device: torch.device) -> Tensor:
    """The first ``count`` ≤ PAGE words of the streams of directions ``key.direction``, ..., one after the other, flat."""
    base = page_words(key.seed, key.step, device, count)[:count]
    if directions == 1:
        x = torch.mul(base, multiplier(stream(key), 0))
    else:
        factors = [multiplier(stream(key, k), 0) for k in range(key.direction, key.direction + directions)]
        x = torch.outer(send_list(factors, device), base).view(-1)
    return x.bitwise_xor_(x >> _FOLD_TENSOR).mul_(_GOLDEN_TENSOR)


def words_together(
    seed: int, step: int, names: Sequence[str], first: int, count: int, index: Tensor, lengths: Tensor, purpose: str
) -> Tensor:
    """The front words of several parameters' streams, flat: direction ``first`` of all parameters, then the next, ``count`` of them.

    ``lengths`` (count · parameters,): words of each in turn; ``index``: their numbers, 0 ... length - 1 for each.
    """
    origins = torch.tensor([signed(_origin(seed, step, name, purpose)) for name in names])
    directions = torch.arange(first, first + count).mul_(_GOLDEN_TENSOR).unsqueeze(1)
    factors = send(mixed(mixed(origins + directions)).bitwise_or_(1), index.device)  # page 0
    x = page_words(seed, step, index.device).index_select(0, index)
    x.mul_(torch.repeat_interleave(factors.view(-1), lengths, output_size=index.numel()))
    return x.bitwise_xor_(x >> _FOLD_TENSOR).mul_(_GOLDEN_TENSOR)


@tagged("directions")
def prefetch(seed: int, step: int, names: Sequence[str], device: torch.device) -> None:
    """Do the host's work for the directions of a coming step, while a device is busy."""
    for name in names:
        _origin(seed, step, name, Key._field_defaults["purpose"])
    page_words(seed, step, device)


def words_at(key: Key, index: Tensor) -> Tensor:
    """The words of a stream with the numbers ``index``, int64 of any shape."""
    base = page_words(key.seed, key.step, index.device)
    x = base[index & (PAGE - 1)].mul_(multipliers(stream(key), index >> 14))
    return x.bitwise_xor_(x >> 32).mul_(GOLDEN_SIGNED)
