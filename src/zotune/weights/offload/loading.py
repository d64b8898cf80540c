"""Offloading a model that is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from zotune.weights.offload import blocks as finding
from zotune.weights.offload.blocks import Moving, NotOffloadable, Part, bytes_of, moving_of
from zotune.weights.offload.budget import Arrangement, Needs, arrange, process
from zotune.weights.offload.stores import DiskStore, Form, HostStore, Store
from zotune.weights.offload.stream import Stream, stream_of

#: Where weights can be while they are away.
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
    """Have the blocks of a model come and go; the model is used as before, for zeroth-order training and evaluation.

    Args:
        model: any module with repeated blocks; everything else in it moves to ``device`` and stays.
        to: ``"cpu"`` (host memory) or ``"disk"`` (a scratch file). For a model that does not fit in memory, see
            :func:`zotune.training.offloaded_loading.load`.
        device: where it computes; None: where it is.
        blocks: name of the list of blocks, or of several; None: found by structure.
        resident: so many blocks stay.
        prefetch: blocks on their way at a time.
        max_memory: bytes of ``device``; chooses ``resident`` and ``prefetch``.
        needs: what computing takes of that (``memory.offloaded`` predicts it); None: 15%.
        scratch: folder for the scratch file.
        dtype: keep floating-point weights in this dtype while they are away, for models whose offloaded weights are not trained.

    Raises:
        ValueError: an argument makes no sense, the model is offloaded already, or no blocks are found.

    Example:
        >>> model = nn.Sequential(nn.ModuleList([nn.Linear(128, 128) for _ in range(3)]))
        >>> stream = offload(model, "cpu")
        >>> stream.bring_back()
    """
    check_options(to, resident, prefetch)
    if stream_of(model) is not None:
        raise NotOffloadable("the model is offloaded already.")
    if dtype is not None and to == "disk":
        raise NotOffloadable("dtype is of weights in host memory: offload to 'cpu', or convert the model before.")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    # Weights that are in this process's memory now leave it.
    weights = sum(bytes_of(t) for t in [*model.parameters(), *model.buffers()] if t.device.type == "cpu") if device.type == "cpu" else 0
    arrangement = arranged(model, resident, prefetch, max_memory, device, blocks, needs, weights)
    resident, prefetch = arrangement.resident, arrangement.prefetch
    parts = parts_away(model, blocks, resident)
    moving = moving_of(parts, model, device)
    values = [[(form_of(one), one.tensor.detach()) for one in some] for some in moving]
    store: Store = HostStore(values, device, dtype) if to == "cpu" else DiskStore.of_values(values, device, scratch)
    stream = Stream(parts, moving, store, device, prefetch + 1, arrangement if max_memory is not None else None)
    del values
    model.to(device)
    return stream


def arranged(
    model: nn.Module,
    resident: int,
    prefetch: int,
    cap: int | None,
    device: torch.device,
    named: str | Sequence[str] | None,
    needs: Needs | None,
    leaving: int = 0,
) -> Arrangement:
    """As asked for, or chosen under a cap; ``leaving`` bytes of what the process takes will be free by then."""
    if cap is None:
        return Arrangement(resident, prefetch, 0, 0)
    if resident or prefetch != 1:
        raise NotOffloadable("max_memory chooses how many blocks stay and how many are on their way: leave resident and prefetch out.")
    return arrange(model, cap, device, named, lambda device: max(0, process(device) - leaving), needs)


def check_options(to: str, resident: int, prefetch: int) -> None:
    """Refuse what makes no sense."""
    if to not in PLACES:
        raise NotOffloadable(f"weights can be offloaded to {' or '.join(PLACES)}, not to {to!r}.")
    if resident < 0 or prefetch < 1:
        raise NotOffloadable(f"resident must be at least 0 and prefetch at least 1, not {resident} and {prefetch}.")


def parts_away(model: nn.Module, named: str | Sequence[str] | None, resident: int) -> list[Part]:
    """The blocks that come and go: all but the first ``resident``."""
    parts = finding.find(model, named)
    if resident >= len(parts):
        raise NotOffloadable(f"{resident} resident blocks are all that the model has ({len(parts)}): train it without offloading.")
    return parts[resident:]


def form_of(one: Moving) -> Form:
    """What of a tensor a store has to know."""
    return Form(one.name, one.tensor.dtype, tuple(one.tensor.shape))
