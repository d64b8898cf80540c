"""Where a weight is stored while it is not computed with: on the device, or offloaded (see ``weights.offload``).

An offloaded tensor carries a *handle*. Code outside of a forward pass reads it ``with loaded(weight)`` and writes it by
``when_loaded(weight, work)``: at once where the weight is not offloaded, else when it is next loaded, in the order of the calls. Writes are
pure functions of keys and coefficients, so nothing depends on when they happen, and a killed run loses nothing that its journal holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

_ATTRIBUTE = "_zotune_offload_handle"


class OffloadHandle(Protocol):
    """Loads and writes an offloaded tensor."""

    @property
    def lossy(self) -> bool:
        """Whether the stored copy has fewer bits than the tensor, which is then read-only."""
        ...

    def loaded(self) -> AbstractContextManager[None]:
        """Within the block the tensor has its values, with all pending writes."""
        ...

    def write(self, work: Callable[[], object], pending_bytes: int) -> None:
        """Call ``work``, which writes the tensor, now or when it is next loaded; until then ``work`` keeps ``pending_bytes`` in memory."""
        ...

    def attach(self, tensor: Tensor) -> None:
        """Offload another tensor, of zeros, together with this one."""
        ...


def offload_handle(tensor: Tensor) -> OffloadHandle | None:
    """The handle of an offloaded tensor; None for others."""
    return getattr(tensor, _ATTRIBUTE, None)


def set_offload_handle(tensor: Tensor, handle: OffloadHandle) -> None:
    """Mark a tensor as offloaded."""
    setattr(tensor, _ATTRIBUTE, handle)


def clear_offload_handle(tensor: Tensor) -> None:
    """Mark a tensor as not offloaded."""
    if hasattr(tensor, _ATTRIBUTE):
        delattr(tensor, _ATTRIBUTE)


def loaded(tensor: Tensor) -> AbstractContextManager[None]:
    """Within the block the tensor has its values."""
    handle = offload_handle(tensor)
    return nullcontext() if handle is None else handle.loaded()


def when_loaded(tensor: Tensor, work: Callable[[], object], pending_bytes: int = 0) -> None:
    """Call ``work``, which writes the tensor, now or when it is next loaded."""
    handle = offload_handle(tensor)
    if handle is None:
        work()
    else:
        handle.write(work, pending_bytes)


def snapshot(tensor: Tensor) -> Tensor:
    """The tensor's values beyond the next load: itself, or a copy where it is offloaded."""
    if offload_handle(tensor) is None:
        return tensor.detach()
    with loaded(tensor):
        return tensor.detach().clone()


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which other processes may store other rows."""
    return hasattr(parameter, "full_tensor") and hasattr(parameter, "device_mesh")
