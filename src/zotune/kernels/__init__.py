"""Triton kernels for accelerators, each with a reference in torch: ``perturb`` is bit for bit equal to ``rng.directions`` and
``weights.precision``; ``low_rank`` and ``layer_norm`` up to the rounding of float32 sums."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

#: Largest rank of a low-rank product: its loop is unrolled.
MAX_RANK = 16


@functools.cache
def _module(name: str) -> Any:
    return None if importlib.util.find_spec("triton") is None else importlib.import_module(f"zotune.kernels.{name}")


def _is_reachable(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"  # triton's interpreter runs on a CPU


def perturb_kernels(weight: Tensor) -> Any:
    """The module ``perturb`` if it supports such a weight on its device; otherwise None."""
    if _is_reachable(weight) and weight.dtype in (torch.float32, torch.bfloat16):
        return _module("perturb")
    return None


def low_rank_kernels(tensor: Tensor, rank: int) -> Any:
    """The module ``low_rank`` if it supports tensors like this one and factors of this rank; otherwise None."""
    if _is_reachable(tensor) and tensor.dtype in (torch.float32, torch.bfloat16) and rank <= MAX_RANK:
        return _module("low_rank")
    return None


def layer_norm_kernels(x: Tensor) -> Any:
    """The module ``layer_norm`` if it supports such rows; otherwise None."""
    if not _is_reachable(x) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    module = _module("layer_norm")
    return module if module is not None and x.shape[-1] <= module.MAX_ROW else None
