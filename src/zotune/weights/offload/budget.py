"""How many blocks are resident under a memory cap."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from zotune.io.sizes import size_text
from zotune.weights.offload.blocks import NotOffloadable, bytes_of, find_blocks, offloaded_tensors

#: Fraction of the cap for activations, directions and the allocator, where the memory of a step is unknown.
SPARE = 0.15
#: Fraction for the allocator, where the memory of a step is known.
ROUNDING = 0.05
#: Bytes of a CUDA context and the libraries' workspaces.
CONTEXT = 700 << 20
#: Blocks prefetched at a time, at most.
DEEPEST = 3

_binary = partial(size_text, binary=True)


@dataclass(frozen=True)
class Needs:
    """Memory beside the weights, as ``memory.offload_needs`` predicts it.

    Attributes:
        step: bytes of a step.
        growth: size of a block with everything that training keeps for it, in units of its weights.
    """

    step: int
    growth: float = 1.0


@dataclass(frozen=True)
class OffloadPlan:
    """Blocks that are resident and prefetched under a cap, and the total bytes, with those of a step where known."""

    resident: int
    prefetch: int
    total: int
    cap: int
    step: int | None = None

    def describe(self) -> str:
        """The plan and its predicted peak."""
        step = f", {_binary(self.step)} of it for a step" if self.step is not None else ""
        return (
            f"--max_memory {_binary(self.cap)} fits: {self.resident} blocks resident, {self.prefetch} prefetched at a time; predicted peak "
            f"{_binary(self.total)}{step}"
        )


def plan_offload(
    model: nn.Module,
    cap: int,
    device: torch.device,
    named: str | Sequence[str] | None = None,
    taken: Callable[[torch.device], int] | None = None,
    needs: Needs | None = None,
) -> OffloadPlan:
    """As many resident blocks as fit beside the rest of the model and the buffers of the offloaded ones.

    Args:
        model: the model, with or without memory.
        cap: bytes of the device that computes.
        device: the device that computes.
        named: the list of blocks, as in :func:`zotune.weights.offload.offload`.
        taken: bytes in use by the process; the default measures.
        needs: memory of a step; None: a fraction of the cap.

    Raises:
        ValueError: the smallest plan does not fit; the message says how much it takes.
    """
    plain = _block_sizes(model, named)
    step, growth, spare = (0, 1.0, SPARE) if needs is None else (needs.step, needs.growth, ROUNDING)
    sizes = [int(size * growth) for size in plain]
    buffer, base = max(sizes), (taken or process)(device) + _whole(model) - sum(plain)
    usable = int(cap * (1 - spare))
    least = base + step + 2 * buffer
    if least > usable:
        computing = "" if needs is None else f", a step {_binary(step)}"
        raise NotOffloadable(
            f"a cap of {_binary(cap)} is too small: the rest takes {_binary(base)}{computing} and two blocks {_binary(2 * buffer)}, "
            f"so --max_memory must be at least {_up(least / (1 - spare))}."
        )
    resident = 0
    while resident < len(sizes) - 1 and least + sum(sizes[: resident + 1]) <= usable:
        resident += 1
    total = least + sum(sizes[:resident])
    prefetch = 1
    while prefetch < DEEPEST and resident < len(sizes) - 1 - prefetch and total + buffer <= usable:
        prefetch, total = prefetch + 1, total + buffer
    return OffloadPlan(resident, prefetch, total, cap, None if needs is None else step)


def sizes(model: nn.Module, named: str | Sequence[str] | None = None) -> tuple[int, int, int, int]:
    """(bytes of all weights, of those that are never offloaded, of the largest block's offloaded ones, number of blocks)."""
    of_blocks, whole = _block_sizes(model, named), _whole(model)
    return whole, whole - sum(of_blocks), max(of_blocks), len(of_blocks)


def _block_sizes(model: nn.Module, named: str | Sequence[str] | None) -> list[int]:
    found = offloaded_tensors(find_blocks(model, named), model, torch.device("cpu"))
    return [sum(bytes_of(one.tensor) for one in some) for some in found]


def _whole(model: nn.Module) -> int:
    return sum(bytes_of(p) for p in model.parameters()) + sum(bytes_of(b) for b in model.buffers())


def _up(count: float) -> str:
    """A sufficient size, as written for ``--max_memory``."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(count / unit * 100) / 100:.2f}{name}"


def process(device: torch.device) -> int:
    """Bytes of the device in use before any weight is loaded."""
    if device.type == "cuda":
        return CONTEXT
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
