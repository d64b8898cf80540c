"""Half-precision weights that lose no update: stochastic rounding, or float32 coordinates kept as (half weight, int16 residual).

A bfloat16 weight of size 0.02 has a spacing of 1.2e-4; a zeroth-order update is around 1e-6. Added in place, 99% of it is rounded
away. Two remedies:

- **stochastic rounding** to one of the two adjacent numbers, unbiased, its random bits keyed like directions. No memory. An update |u| far
  below the spacing s adds an error of variance |u| s.
- **residual**: the float32 value x is split into the model's own half-precision weight and 16 more bits beside it. For bfloat16 the
  pair is x bit for bit; for float16 it is x to 2^-25 of its size. No error, at 2 bytes a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Key, uniform_integers

HALF = (torch.bfloat16, torch.float16)

#: The exponent bits of a float32; alone, they are the power of two at or below it.
_EXPONENT = 0x7F800000


def _float16_spacing(x: Tensor, fraction: float = 1.0) -> Tensor:
    """``fraction`` of the distance between neighboring float16 numbers at x (float32): 2^(e - 10), never below the subnormal 2^-24."""
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32)
    return power.clamp_(min=2.0**-14).mul_(2.0**-10 * fraction)


@tagged("directions")
def join(half: Tensor, residual: Tensor) -> Tensor:
    """The float32 value of (half, residual); shapes equal, residual int16."""
    x = half.float()
    if half.dtype == torch.bfloat16:
        x.view(torch.int32).add_(residual)
        return x
    return x.addcmul_(residual.float(), _float16_spacing(x, 2.0**-15))


@tagged("directions")
def split_into(x: Tensor, half: Tensor, residual: Tensor) -> None:
    """Write x (float32, contiguous; overwritten) as (half, residual), int16, with ``join(half, residual) == x``.

    half is x rounded to nearest, the residual the rounding error.
    """
    if half.dtype == torch.bfloat16:
        bits = x.view(torch.int32)
        residual.copy_(bits)  # the lower 16 bits, as a signed number
        half.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))  # ties away from zero: the rest fits 16 bits
        return
    half.copy_(x)
    nearest = half.float()
    residual.copy_(x.sub_(nearest).div_(_float16_spacing(nearest, 2.0**-15)).round_().clamp_(-(2**15), 2**15 - 1))


@tagged("directions")
def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(half, residual) of :func:`split_into`, as new tensors; x stays."""
    half, residual = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=torch.int16)
    split_into(x.clone(), half, residual)
    return half, residual


@tagged("directions")
def stochastic_round(x: Tensor, dtype: torch.dtype, key: Key, first: int = 0) -> Tensor:
    """x (float32, flat) rounded to an adjacent number of ``dtype``, up with probability (x - lower) / spacing, so E[result] = x.

    Numbers that ``dtype`` represents do not change. ``first``: index of x's first element in the parameter, which keys the random bits.
    """
    part = slice(first, first + x.numel())
    if dtype == torch.bfloat16:
        dither = uniform_integers(key, part, 16, x.device)
        return dither.add_(x.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    if dtype == torch.float16:
        dither = uniform_integers(key, part, 24, x.device).double().add_(0.5).mul_(2.0**-24)
        spacing = _float16_spacing(x).double()
        return x.double().div_(spacing).add_(dither).floor_().mul_(spacing).to(dtype)
    return x.to(dtype)
