"""Rehearsal: running the very code that trains on tensors without data, in seconds for a model of any size.

``torch``'s fake tensors have shapes and dtypes and no numbers. What a step wants to know of numbers is answered with something plausible: a
loss is about 1, two tensors are equal, all ids of a batch differ. Of the loops over blocks of a large tensor one block is walked, for all
of them use the same memory.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zotune.errors import NotBatchableError
from zotune.io.caches import clear_tensor_caches
from zotune.io.execution import Execution, executing
from zotune.rng.directions import ACCELERATOR_BLOCK, CPU_BLOCK

aten = torch.ops.aten


class Answers(TorchDispatchMode):
    """Answers what fake tensors cannot: what their numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap every call in a guard against compiling it, which costs as much as the call
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # the most frequent question
            return args[0].fake_device
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


@functools.cache
def _over_fake(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """A tensor subclass of zotune, over a fake tensor, which has a class of its own already."""

    class OverFake(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotBatchableError(f"{func} has no form for such a weight")

    return OverFake


def _over_fakes(cls: type[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as one of class ``cls``."""
    made: torch.Tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        _over_fake(cls), tensor.shape, dtype=tensor.dtype, device=tensor.device
    )
    return made


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


@contextlib.contextmanager
def rehearsal(*, accelerator: bool = False) -> Iterator[FakeTensorMode]:
    """For the length of a block torch makes fake tensors, and zotune's steps run on them.

    Args:
        accelerator: allocate as on a GPU, in larger blocks, and a large weight whole where a CPU takes strips of it.
    """

    @contextlib.contextmanager
    def no_generators(*unused: Any, **options: Any) -> Iterator[None]:
        yield

    execution = Execution(
        block_size=ACCELERATOR_BLOCK if accelerator else CPU_BLOCK,
        first_block_only=True,
        whole_weights=accelerator,
        isolates_generators=False,
        clock=float,  # what takes no time is not worth timing
        make_subclass=_over_fakes,
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(executing(execution))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", no_generators))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # all are 0: in place, as with float32
        clear_tensor_caches()  # what is kept from real steps has no place here, nor what is made here in real ones
        stack.callback(clear_tensor_caches)
        stack.enter_context(mode)
        stack.enter_context(Answers())
        yield mode
