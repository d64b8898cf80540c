"""Dry runs: the code that trains, run on tensors without data, in seconds for a model of any size.

torch's fake tensors have shapes and dtypes and no values. Where a step reads values it gets plausible ones: a loss is about 1, two tensors
are equal, all ids of a batch differ. A loop over blocks of a large tensor ends after one block, since all use the same memory.
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


class PlausibleValues(TorchDispatchMode):
    """Gives the values that fake tensors do not have."""

    def __init__(self) -> None:
        super().__init__()
        self._scalars_read = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # the guard against compilation costs as much as the call
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # the most frequent question
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            self._scalars_read += 1  # losses differ, or there would be no update
            return True if dtype == torch.bool else 1.0 + self._scalars_read % 7 / 1024 if dtype.is_floating_point else 1
        if func in (aten.equal.default, aten.is_same_size.default):
            return True
        if func is aten._unique2.default:
            flat = args[0].reshape(-1)
            return torch.empty_like(flat), torch.empty_like(args[0], dtype=torch.int64), torch.empty_like(flat, dtype=torch.int64)
        if func is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is aten.bincount.default:  # minlength is the length
            weights, length = (args[1] if len(args) > 1 else None), (args[2] if len(args) > 2 else kwargs.get("minlength", 0))
            return torch.empty(length, dtype=torch.int64 if weights is None else torch.float64, device=args[0].device)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):  # a mask selects all, the most possible
            args = (args[0], _without_masks(args[1]), *args[2:])
        return func(*args, **kwargs)


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The indices, every mask replaced by integer indices as for a mask that is true everywhere."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]
    return found


@functools.cache
def _over_fake(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """A tensor subclass of zotune over fake tensors."""

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
    """``nn.Module.to`` and its like by new parameters: torch's own swaps tensors, which fails for those with weak references."""
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
def dry_run(*, accelerator: bool = False) -> Iterator[FakeTensorMode]:
    """In the block torch makes fake tensors, and steps run on them.

    Args:
        accelerator: allocate as on a GPU: in larger blocks, and a large weight whole where a CPU computes strips of it.
    """

    @contextlib.contextmanager
    def no_generators(*unused: Any, **options: Any) -> Iterator[None]:
        yield

    execution = Execution(
        block_size=ACCELERATOR_BLOCK if accelerator else CPU_BLOCK,
        first_block_only=True,
        whole_weights=accelerator,
        has_values=False,
        isolates_generators=False,
        clock=float,  # always 0
        make_subclass=_over_fakes,
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(executing(execution))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", no_generators))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # all are 0, as if updates were in place
        clear_tensor_caches()  # fake and real steps share no tensors
        stack.callback(clear_tensor_caches)
        stack.enter_context(mode)
        stack.enter_context(PlausibleValues())
        yield mode
