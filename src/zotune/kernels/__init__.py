"""Kernels of our own for accelerators, each with a plain reference that gives the same numbers (``directions``, ``precision``)."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def _triton_moves() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from zotune.kernels import moves

    return moves


def moves_for(weight: Tensor, residual: Tensor | None) -> ModuleType | None:
    """The module with ``perturb`` and ``update`` for such a weight on its device; None where torch's own operations have to do."""
    if weight.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # triton's interpreter works on a CPU
        return None
    if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and residual is not None):
        return _triton_moves()
    return None
