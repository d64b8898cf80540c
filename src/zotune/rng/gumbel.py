"""Keyed Gumbel noise: sampling from a language model as a pure function of a row's key.

The token argmax_v (z_v + g_v), g_v = −ln(−ln u_v) with independent uniform u_v, has the distribution softmax(z) (the Gumbel-max trick,
1411.0030). Here u_v is a function of (the row's key, position, v), so the same row gets the same noise at every point of a step, on every
process and after every resume: common random numbers, without a generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zotune.rng.counter import GOLDEN_SIGNED, SECOND_SIGNED, Key, mixed, signed, stream


def row_keys(seed: int, step: int, rows: Tensor) -> Tensor:
    """Keys of the rows with these numbers at a step, int64, of the shape of ``rows`` (int64)."""
    return mixed(rows * GOLDEN_SIGNED + signed(stream(Key(seed, step, 0, "", "sampling"))))


def sample_keys(keys: Tensor, samples: int) -> Tensor:
    """Keys of several samples a row, (R, samples) from (R,)."""
    return mixed(keys.unsqueeze(1) + torch.arange(1, samples + 1, device=keys.device) * SECOND_SIGNED)


def gumbel(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise of the tokens at a position, float32, (R, vocabulary).

    Args:
        keys: of the rows, int64, (R,).
        position: of the token among those of its row.
        vocabulary: number of tokens.

    Example:
        >>> keys = row_keys(0, 0, torch.arange(2))
        >>> bool((gumbel(keys, 3, 5)[1] == gumbel(keys[1:], 3, 5)[0]).all())
        True
    """
    at = mixed(keys + signed((position + 1) * GOLDEN_SIGNED)).unsqueeze(1)
    words = mixed(torch.arange(1, vocabulary + 1, device=keys.device) * GOLDEN_SIGNED + at)
    uniform = ((words >> 41) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)  # exact, in (0, 1) without its ends
    return uniform.log_().neg_().log_().neg_()
