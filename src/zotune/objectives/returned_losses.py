"""What a loss function returns, in terms of the losses recorded while it was called: r_i = w_i ℓ_i, or r = w · mean(ℓ).

A quotient r_i / ℓ_i exists for every r. Forward derivatives tell a factor from another function: ℓ gets the tangent ℓ ⊙ u with known
numbers u, and what r computes of it has the tangent J (ℓ ⊙ u). That is r ⊙ u just where every r_i is ℓ_i times a number without a
derivative, so that a sigmoid, a difference of two texts, a sum with another term, or another order of the examples is found out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Relative differences that are rounding: of float32, and of half precision in units of it.
ROUNDING, HALF_UNITS = 1e-5, 4


def _spread(size: int, first: int, like: Tensor) -> Tensor:
    """u: different numbers of [1, 2)."""
    return 1 + torch.arange(first + 1, first + size + 1, device=like.device, dtype=torch.float32).mul(0.6180339887).frac()


def tangents(losses: Tensor, first: int = 0) -> Tensor:
    """ℓ ⊙ u of recorded losses (m,), the first of which is number ``first`` of a call."""
    return losses * _spread(len(losses), first, losses).to(losses.dtype)


def factors(returned: Any, recorded: Tensor) -> tuple[Tensor, Tensor]:
    """(w (m,), whether each of the returned losses is known to be such a multiple (n,)) of recorded losses (m,).

    w is exactly 1 for losses returned as they are, and 0 for those that are not multiples. Non-finite losses count as known.

    Args:
        returned: a scalar, or losses (n,), within the dual level in which ``recorded`` got its tangents.
        recorded: ℓ of all forwards of the call.
    """
    if not isinstance(returned, Tensor):
        returned = torch.as_tensor(returned, dtype=torch.float32)
    primal, tangent = forward_ad.unpack_dual(returned)
    value, loss = primal.detach().float().to(recorded.device), recorded.detach().float()
    slope = torch.full_like(value, torch.nan) if tangent is None else tangent.detach().float().to(recorded.device)
    rounding = max(ROUNDING, HALF_UNITS * torch.finfo(returned.dtype).eps if returned.is_floating_point() else 0.0)
    spread = _spread(len(loss), 0, loss)
    if value.shape == loss.shape or value.numel() == len(loss) == 1:
        value, slope = value.reshape(-1), slope.reshape(-1)
        same = (value - loss).abs() <= rounding * loss.abs()
        known = (slope - value * spread).abs() <= rounding * (value * spread).abs()
        found = torch.where(same | (loss == 0), 1.0, value / loss)
    elif not value.dim():
        mean, weighted = loss.mean(), (loss * spread).mean()
        ratio = value / mean
        same = (ratio - 1).abs() <= rounding
        known = (slope * mean - value * weighted).abs() <= rounding * (value * weighted).abs()
        found = torch.where(same, 1.0, ratio).expand(len(loss))
    else:
        return torch.zeros_like(loss), torch.zeros(value.numel(), dtype=torch.bool, device=loss.device)
    valid = same | known | ~value.isfinite()
    return torch.where(valid, found, 0.0), valid.reshape(-1)
