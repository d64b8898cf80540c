"""Half-precision weights that lose no update: float32 coordinates kept as (half weight, int16 residual), and stochastic rounding.

A bfloat16 weight of size 0.02 has a spacing of 1.2e-4; a zeroth-order update is around 1e-6. Added in place, 99% of it is rounded
away. Two cures:

- **residual**: the float32 value x is split into the model's own half-precision weight and 16 more bits beside it. For bfloat16 the
  pair is x bit for bit; for float16 it is x to 2^-25 of its size. No update is lost, at 2 bytes a weight.
- **stochastic rounding** to one of the two neighbours with probabilities that make the result right on average, its random bits keyed
  like everything else. No memory, unbiased, but noisy: for updates that are rare and large, such as folding A Vᵀ once an interval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zotune.directions import Key, uniform_integers

HALF = (torch.bfloat16, torch.float16)


def _float16_spacing(x: Tensor) -> Tensor:
    """Distance between neighbouring float16 numbers at x, as float32: 2^(e - 10), never below the subnormal 2^-24."""
    exponent = torch.frexp(x.float()).exponent - 1
    exponent = exponent.clamp_(min=-14).sub_(10)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def join(half: Tensor, residual: Tensor) -> Tensor:
    """The float32 value that (half, residual) stands for; shapes equal, residual int16."""
    if half.dtype == torch.bfloat16:
        bits = half.view(torch.int16).to(torch.int32).mul_(1 << 16).add_(residual)
        return bits.view(torch.float32)
    return half.float().addcmul_(residual.float(), _float16_spacing(half), value=2.0**-15)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(half, residual) with ``join(half, residual) == x``: half is x rounded to nearest, residual int16 what that left out."""
    if dtype == torch.bfloat16:
        bits = x.view(torch.int32)
        high = (bits + 0x8000) >> 16  # nearest, ties away from zero, so that what is left fits a signed 16-bit number
        return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)
    half = x.to(dtype)
    residual = (x - half.float()).div_(_float16_spacing(half)).mul_(2.0**15)
    return half, residual.round_().clamp_(-(2**15), 2**15 - 1).to(torch.int16)


def stochastic_round(x: Tensor, dtype: torch.dtype, key: Key, block: int = 0) -> Tensor:
    """x (float32, flat) rounded to a neighbour in ``dtype``, up with probability (x - lower) / spacing, so E[result] = x.

    A number that ``dtype`` represents stays what it is. Float32 comes back unchanged.
    """
    if dtype == torch.bfloat16:
        dither = uniform_integers(key, block, x.numel(), 16, x.device)
        return ((x.view(torch.int32) + dither) >> 16).to(torch.int16).view(torch.bfloat16)
    if dtype == torch.float16:
        dither = uniform_integers(key, block, x.numel(), 24, x.device).double().add_(0.5).mul_(2.0**-24)
        spacing = _float16_spacing(x).double()
        return x.double().div_(spacing).add_(dither).floor_().mul_(spacing).to(dtype)
    return x.to(dtype)
