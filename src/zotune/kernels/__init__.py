"""Kernels of our own for accelerators, each with a plain reference: ``moves`` gives the same numbers as ``directions`` and ``precision``,
``products`` and ``norms`` the same up to the rounding of float32 sums."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

#: A product's rank is unrolled in its kernel.
MOST_RANK = 16


@functools.cache
def _module(name: str) -> Any:
    return None if importlib.util.find_spec("triton") is None else importlib.import_module(f"zotune.kernels.{name}")


def _reach(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"  # triton's interpreter works on a CPU


def perturb_kernels(weight: Tensor, residual: Tensor | None) -> Any:
    """The module with ``perturb`` and ``update`` for such a weight on its device; None where torch's own operations have to do."""
    if _reach(weight) and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and residual is not None)):
        return _module("perturb")
    return None


def low_rank_kernels(tensor: Tensor, rank: int) -> Any:
    """The module with ``plus``, ``fold`` and ``outer`` for tensors like this one and factors of this rank; None as above."""
    if _reach(tensor) and tensor.dtype in (torch.float32, torch.bfloat16) and rank <= MOST_RANK:
        return _module("low_rank")
    return None


def layer_norm_kernels(x: Tensor) -> Any:
    """The module with ``layer_norm`` for such rows; None as above."""
    if not _reach(x) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    module = _module("layer_norm")
    return module if module is not None and x.shape[-1] <= module.LONGEST else None
