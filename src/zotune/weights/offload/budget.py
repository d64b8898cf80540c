"""How much of a model stays under a memory cap, and what a step then costs."""

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
from zotune.weights.offload import blocks
from zotune.weights.offload.blocks import NotOffloadable, bytes_of, moving_of

#: Of the cap, what is left to activations, to directions and to what the allocator rounds up to, where nobody knows what a step takes.
SPARE = 0.15
#: Where that is known, what is left to the allocator.
ROUNDING = 0.05
#: What a CUDA context and the libraries' workspaces take of a card.
CONTEXT = 700 << 20
#: Blocks on their way at a time, at most: one more hides no more than unsteadiness of the link.
DEEPEST = 3

_binary = partial(size_text, binary=True)


@dataclass(frozen=True)
class Needs:
    """What computing takes beside weights (``memory.offloaded`` predicts it): bytes of a step, and how many times larger than its weights
    a block is with what training keeps for it."""

    step: int
    growth: float = 1.0


@dataclass(frozen=True)
class Arrangement:
    """Under a cap: blocks that stay, blocks on their way, and the bytes that all this takes, those of a step among them where known."""

    resident: int
    prefetch: int
    total: int
    cap: int
    step: int | None = None

    def describe(self) -> str:
        """What is where, and how much of the cap it is predicted to take."""
        step = f", {_binary(self.step)} of it for a step" if self.step is not None else ""
        return (
            f"--max_memory {_binary(self.cap)} fits: {self.resident} blocks stay, {self.prefetch} at a time on their way; predicted peak "
            f"{_binary(self.total)}{step}"
        )


def arrange(
    model: nn.Module,
    cap: int,
    device: torch.device,
    named: str | Sequence[str] | None = None,
    taken: Callable[[torch.device], int] | None = None,
    needs: Needs | None = None,
) -> Arrangement:
    """As many blocks as fit beside what always stays and the rooms for those that come and go.

    Args:
        model: the model, with or without memory.
        cap: bytes, of the device where it computes.
        device: which that is.
        named: the list of blocks, as in :func:`zotune.weights.offload.offload`.
        taken: bytes that the process takes already; the default looks.
        needs: what a step takes; None: a share of the cap.

    Raises:
        ValueError: the smallest arrangement does not fit; how much it takes.
    """
    plain = _of_blocks(model, named)
    step, growth, spare = (0, 1.0, SPARE) if needs is None else (needs.step, needs.growth, ROUNDING)
    sizes = [int(size * growth) for size in plain]
    room, base = max(sizes), (taken or process)(device) + _whole(model) - sum(plain)
    usable = int(cap * (1 - spare))
    least = base + step + 2 * room
    if least > usable:
        computing = "" if needs is None else f", a step's computing {_binary(step)}"
        raise NotOffloadable(
            f"a cap of {_binary(cap)} is too small: what always stays takes {_binary(base)}{computing} and two blocks {_binary(2 * room)}, "
            f"so --max_memory must be at least {_up(least / (1 - spare))}."
        )
    resident = 0
    while resident < len(sizes) - 1 and least + sum(sizes[: resident + 1]) <= usable:
        resident += 1
    total = least + sum(sizes[:resident])
    prefetch = 1
    while prefetch < DEEPEST and resident < len(sizes) - 1 - prefetch and total + room <= usable:
        prefetch, total = prefetch + 1, total + room
    return Arrangement(resident, prefetch, total, cap, None if needs is None else step)


def sizes(model: nn.Module, named: str | Sequence[str] | None = None) -> tuple[int, int, int, int]:
    """(bytes of all weights, of what always stays, of the largest block's part that can be away, blocks)."""
    of_blocks, whole = _of_blocks(model, named), _whole(model)
    return whole, whole - sum(of_blocks), max(of_blocks), len(of_blocks)


def _of_blocks(model: nn.Module, named: str | Sequence[str] | None) -> list[int]:
    parts = blocks.find(model, named)
    return [sum(bytes_of(one.tensor) for one in some) for some in moving_of(parts, model, torch.device("cpu"))]


def _whole(model: nn.Module) -> int:
    return sum(bytes_of(p) for p in model.parameters()) + sum(bytes_of(b) for b in model.buffers())


def _up(count: float) -> str:
    """A size that is enough, as one writes it for ``--max_memory``."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(count / unit * 100) / 100:.2f}{name}"


def process(device: torch.device) -> int:
    """Bytes of the device that are taken before any weight is."""
    if device.type == "cuda":
        return CONTEXT
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
