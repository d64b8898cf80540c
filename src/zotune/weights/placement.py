"""Where a weight is while nobody computes with it: in place as a rule, elsewhere where the model is offloaded (``offloading``).

A tensor that comes and goes has a *home*, told by an attribute. Whoever reads such a weight outside of a forward pass does so
``with loaded(weight)``, and whoever writes it says what is to be done ``when_loaded``: at once where the weight has no home, else as it
next passes by. Writes of one weight happen in the order in which they were asked for. They are pure functions of keys and coefficients, so
that nothing depends on when they happen, and a run that is killed before has lost nothing that its journal does not say.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

_ATTRIBUTE = "_zotune_home"


class OffloadHandle(Protocol):
    """Keeps a tensor while it is away.

    Attributes:
        rounds: whether it keeps fewer bits than the tensor has, so that the tensor can only be read.
    """

    @property
    def lossy(self) -> bool: ...

    def loaded(self) -> AbstractContextManager[None]:
        """Brings the tensor in, with all that was to be written, for the length of a block."""
        ...

    def write(self, work: Callable[[], object], held: int) -> None:
        """Calls ``work``, which writes the tensor, now or when it is next at hand; until then ``held`` bytes are kept for it."""
        ...

    def attach(self, tensor: Tensor) -> None:
        """Lets another tensor, of zeros, come and go with this one."""
        ...


def offload_handle(tensor: Tensor) -> OffloadHandle | None:
    """The home of a tensor that comes and goes; None for one that stays."""
    return getattr(tensor, _ATTRIBUTE, None)


def set_offload_handle(tensor: Tensor, where: OffloadHandle) -> None:
    """Tell a tensor where its home is."""
    setattr(tensor, _ATTRIBUTE, where)


def clear_offload_handle(tensor: Tensor) -> None:
    """The tensor stays from now on."""
    if hasattr(tensor, _ATTRIBUTE):
        delattr(tensor, _ATTRIBUTE)


def loaded(tensor: Tensor) -> AbstractContextManager[None]:
    """For the length of a block the tensor holds its values."""
    where = offload_handle(tensor)
    return nullcontext() if where is None else where.loaded()


def when_loaded(tensor: Tensor, work: Callable[[], object], held: int = 0) -> None:
    """Call ``work``, which writes the tensor, as soon as it is at hand."""
    where = offload_handle(tensor)
    if where is None:
        work()
    else:
        where.write(work, held)


def snapshot(tensor: Tensor) -> Tensor:
    """The tensor's values for as long as one likes: itself, or a copy where it comes and goes."""
    if offload_handle(tensor) is None:
        return tensor.detach()
    with loaded(tensor):
        return tensor.detach().clone()


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which other processes may hold the other part."""
    return hasattr(parameter, "full_tensor") and hasattr(parameter, "device_mesh")
