"""Offloading a model that is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from zotune.weights.offload.blocks import Block, NotOffloadable, bytes_of, find_blocks, offloaded_tensors
from zotune.weights.offload.budget import Needs, OffloadPlan, plan_offload, process
from zotune.weights.offload.stores import DiskStore, HostStore, Store
from zotune.weights.offload.stream import Stream, stream_of

#: Where offloaded weights are stored.
PLACES = ("cpu", "disk")


def offload(
    model: nn.Module,
    to: str = "cpu",
    *,
    device: str | torch.device | None = None,
    blocks: str | Sequence[str] | None = None,
    resident: int = 0,
    prefetch: int = 1,
    max_memory: int | None = None,
    needs: Needs | None = None,
    scratch: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Stream:
    """Offload the blocks of a model; it is used as before, for zeroth-order training and evaluation.

    Args:
        model: any module with repeated blocks; everything else in it moves to ``device``.
        to: ``"cpu"`` (host memory) or ``"disk"`` (a scratch file). For a model that does not fit in memory, see
            :func:`zotune.training.offloaded_loading.load`.
        device: the device that computes; None: the model's.
        blocks: name of the list of blocks, or of several; None: found by structure.
        resident: number of blocks that are not offloaded.
        prefetch: blocks prefetched at a time.
        max_memory: bytes of ``device``; chooses ``resident`` and ``prefetch``.
        needs: memory of a step (``memory.offload_needs`` predicts it); None: 15% of ``max_memory``.
        scratch: folder for the scratch file.
        dtype: store offloaded floating-point weights in this dtype, if they are not trained.

    Raises:
        ValueError: an argument is invalid, the model is offloaded already, or no blocks are found.

    Example:
        >>> model = nn.Sequential(nn.ModuleList([nn.Linear(128, 128) for _ in range(3)]))
        >>> stream = offload(model, "cpu")
        >>> stream.bring_back()
    """
    check_options(to, resident, prefetch)
    if stream_of(model) is not None:
        raise NotOffloadable("the model is offloaded already.")
    if dtype is not None and to == "disk":
        raise NotOffloadable("dtype applies to weights in host memory: offload to 'cpu', or convert the model before.")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    # Weights in this process's memory leave it.
    leaving = sum(bytes_of(t) for t in [*model.parameters(), *model.buffers()] if t.device.type == "cpu") if device.type == "cpu" else 0
    plan = chosen_plan(model, resident, prefetch, max_memory, device, blocks, needs, leaving)
    resident, prefetch = plan.resident, plan.prefetch
    away = offloaded_blocks(model, blocks, resident)
    tensors = offloaded_tensors(away, model, device)
    values = [[(one.spec, one.tensor.detach()) for one in some] for some in tensors]
    store: Store = HostStore(values, device, dtype) if to == "cpu" else DiskStore.of_values(values, device, scratch)
    stream = Stream(away, tensors, store, device, prefetch + 1, plan if max_memory is not None else None)
    del values
    model.to(device)
    return stream


def chosen_plan(
    model: nn.Module,
    resident: int,
    prefetch: int,
    cap: int | None,
    device: torch.device,
    named: str | Sequence[str] | None,
    needs: Needs | None,
    leaving: int = 0,
) -> OffloadPlan:
    """The requested plan, or one chosen under a cap; ``leaving`` bytes of the process's memory will be freed."""
    if cap is None:
        return OffloadPlan(resident, prefetch, 0, 0)
    if resident or prefetch != 1:
        raise NotOffloadable("max_memory chooses how many blocks are resident and prefetched: leave resident and prefetch out.")
    return plan_offload(model, cap, device, named, lambda device: max(0, process(device) - leaving), needs)


def check_options(to: str, resident: int, prefetch: int) -> None:
    """Raises ValueError for invalid options."""
    if to not in PLACES:
        raise NotOffloadable(f"weights can be offloaded to {' or '.join(PLACES)}, not to {to!r}.")
    if resident < 0 or prefetch < 1:
        raise NotOffloadable(f"resident must be at least 0 and prefetch at least 1, not {resident} and {prefetch}.")


def offloaded_blocks(model: nn.Module, named: str | Sequence[str] | None, resident: int) -> list[Block]:
    """All blocks but the first ``resident``."""
    blocks = find_blocks(model, named)
    if resident >= len(blocks):
        raise NotOffloadable(f"{resident} resident blocks are all that the model has ({len(blocks)}): train it without offloading.")
    return blocks[resident:]
