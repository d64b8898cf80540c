"""Where a weight is while nobody computes with it: in place as a rule, elsewhere where the model is offloaded (``offloading``).

A tensor that comes and goes has a *home*, told by an attribute. Whoever reads such a weight outside of a forward pass does so
``with at_hand(weight)``, and whoever writes it says what is to be done ``when_at_hand``: at once where the weight has no home, else as it
next passes by. Writes of one weight happen in the order in which they were asked for. They are pure functions of keys and coefficients, so
that nothing depends on when they happen, and a run that is killed before has lost nothing that its journal does not say.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

_ATTRIBUTE = "_zotune_home"


class Home(Protocol):
    """Keeps a tensor while it is away.

    Attributes:
        rounds: whether it keeps fewer bits than the tensor has, so that the tensor can only be read.
    """

    @property
    def rounds(self) -> bool: ...

    def at_hand(self) -> AbstractContextManager[None]:
        """Brings the tensor in, with all that was to be written, for the length of a block."""
        ...

    def write(self, work: Callable[[], object], held: int) -> None:
        """Calls ``work``, which writes the tensor, now or when it is next at hand; until then ``held`` bytes are kept for it."""
        ...

    def take_along(self, tensor: Tensor) -> None:
        """Lets another tensor, of zeros, come and go with this one."""
        ...


def home(tensor: Tensor) -> Home | None:
    """The home of a tensor that comes and goes; None for one that stays."""
    return getattr(tensor, _ATTRIBUTE, None)


def settle(tensor: Tensor, where: Home) -> None:
    """Tell a tensor where its home is."""
    setattr(tensor, _ATTRIBUTE, where)


def unsettle(tensor: Tensor) -> None:
    """The tensor stays from now on."""
    if hasattr(tensor, _ATTRIBUTE):
        delattr(tensor, _ATTRIBUTE)


def at_hand(tensor: Tensor) -> AbstractContextManager[None]:
    """For the length of a block the tensor holds its values."""
    where = home(tensor)
    return nullcontext() if where is None else where.at_hand()


def when_at_hand(tensor: Tensor, work: Callable[[], object], held: int = 0) -> None:
    """Call ``work``, which writes the tensor, as soon as it is at hand."""
    where = home(tensor)
    if where is None:
        work()
    else:
        where.write(work, held)


def lasting(tensor: Tensor) -> Tensor:
    """The tensor's values for as long as one likes: itself, or a copy where it comes and goes."""
    if home(tensor) is None:
        return tensor.detach()
    with at_hand(tensor):
        return tensor.detach().clone()


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which other processes may hold the other part."""
    return hasattr(parameter, "full_tensor") and hasattr(parameter, "device_mesh")
