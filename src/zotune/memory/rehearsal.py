"""Rehearsal: running the very code that trains on tensors without data, in seconds for a model of any size.

``torch``'s fake tensors have shapes and dtypes and no numbers. What a step wants to know of numbers is answered with something plausible: a
loss is about 1, two tensors are equal, all ids of a batch differ. Of the loops over blocks of a large tensor one block is walked, for all
of them use the same memory.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zotune import counter, deciding, directions, probe, quantiles, stacked_parameters, unformed
from zotune.stacking import NotStackable
from zotune.subspaces import FullCoordinate

aten = torch.ops.aten


class Answers(TorchDispatchMode):
    """Answers what fake tensors cannot: what their numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            self._asked += 1  # losses differ, or there would be no update
            return True if dtype == torch.bool else 1.0 + self._asked % 7 / 1024 if dtype.is_floating_point else 1
        if func in (aten.equal.default, aten.is_same_size.default):
            return True
        if func is aten._unique2.default:
            flat = args[0].reshape(-1)
            return torch.empty_like(flat), torch.empty_like(args[0], dtype=torch.int64), torch.empty_like(flat, dtype=torch.int64)
        if func is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is aten.bincount.default:  # a minlength says how many there are
            weights, length = (args[1] if len(args) > 1 else None), (args[2] if len(args) > 2 else kwargs.get("minlength", 0))
            return torch.empty(length, dtype=torch.int64 if weights is None else torch.float64, device=args[0].device)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):  # a mask chooses all, as many as can be
            args = (args[0], _places(args[1]), *args[2:])
        return func(*args, **kwargs)


def _places(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with every mask replaced by the places of a mask that is true everywhere, in shape."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            places.append(index)
        else:
            places += [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]
    return places


def _over_fakes(kind: type[torch.Tensor]) -> Any:
    """``Tensor._make_subclass`` for tensor subclasses of zotune, over a fake tensor, which has a class of its own already."""

    class OverFake(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotStackable(f"{func} has no form for such a weight")

    def make(cls: type[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(OverFake, tensor.shape, dtype=tensor.dtype, device=tensor.device)  # type: ignore[attr-defined]

    return make


def _first_of(loop: Callable[..., Any]) -> Callable[..., Any]:
    def first(*args: Any) -> Any:
        return itertools.islice(loop(*args), 1)

    return first


def _apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module.to`` and its like, by new parameters: torch's own would swap tensors, and those that are counted cannot be swapped."""
    for each in module.modules() if recurse else [module]:
        for name, parameter in each._parameters.items():
            if parameter is not None:
                changed = change(parameter.detach())
                if (changed.dtype, changed.device) != (parameter.dtype, parameter.device):
                    each._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = change(buffer)
    return module


class _MakesOverFakes:
    """``torch``, as modules see it that make tensor subclasses, with the ``Tensor`` of above."""

    def __init__(self, kind: type[torch.Tensor]) -> None:
        make = _over_fakes(kind)

        class Tensor:
            _make_subclass = staticmethod(make)

        self.Tensor = Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def rehearsal(*, accelerator: bool = False) -> Iterator[FakeTensorMode]:
    """For the length of a block torch makes fake tensors, and zotune's steps run on them.

    Args:
        accelerator: allocate as on a GPU, which works in larger blocks and forms a large weight whole where a CPU takes strips of it.
    """
    size = directions.ACCELERATOR_BLOCK if accelerator else directions.CPU_BLOCK

    def one_block(numel: int, device: torch.device, work: Callable[[slice], None], start: int = 0) -> None:
        if numel > start:
            work(slice(start, min(numel, start + size)))

    @contextlib.contextmanager
    def no_generators(*unused: Any, **options: Any) -> Iterator[None]:
        yield

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        for original, substitute in (
            (directions.for_blocks, one_block),
            (directions.block_size, lambda device: size),
            (probe.isolated_generators, no_generators),
        ):
            for module in [m for name, m in sys.modules.items() if name.startswith("zotune.") and m is not None]:
                if module.__dict__.get(original.__name__) is original:
                    stack.enter_context(mock.patch.object(module, original.__name__, substitute))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        for name in ("_row_blocks", "strips_at", "product_strips"):
            stack.enter_context(mock.patch.object(FullCoordinate, name, _first_of(getattr(FullCoordinate, name))))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", no_generators))
        stack.enter_context(mock.patch.object(deciding, "clock", float))  # what takes no time is not worth timing
        if accelerator:
            for bound in ("LARGE", "SMALL"):
                stack.enter_context(mock.patch.object(unformed, bound, 1 << 62))
        stack.enter_context(mock.patch.object(directions, "_rooms", directions._Rooms()))
        for module, kind in ((unformed, unformed.Unformed), (stacked_parameters, stacked_parameters.Stacked)):
            stack.enter_context(mock.patch.object(module, "torch", _MakesOverFakes(kind)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # all are 0: in place, as with float32
        forget_tables()  # what is kept from real steps has no place here, nor what is made here in real ones
        stack.callback(forget_tables)
        stack.enter_context(mode)
        stack.enter_context(Answers())
        yield mode


def forget_tables() -> None:
    """Empty the caches of tensors that directions are made of."""
    directions._rooms.kept.clear()
    for module in (counter, directions, quantiles):
        for value in list(vars(module).values()):
            clear = getattr(value, "cache_clear", None)
            if clear is not None and getattr(value, "__module__", "") == module.__name__ and value is not directions._pool:
                clear()
