"""Streaming: a block is loaded when a forward reaches it, while the next one is prefetched.

Two buffers are enough (see ``buffers``). Writes to an offloaded weight are pending (see ``placement``) until its block is loaded, and run
before anything is computed with it; only written blocks are saved. Hooks on the blocks do all of this, whoever calls the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zotune.weights import placement
from zotune.weights.offload.blocks import Block, OffloadedTensor
from zotune.weights.offload.budget import OffloadPlan
from zotune.weights.offload.buffers import BufferPool, Traffic
from zotune.weights.offload.stores import Store, TensorSpec

#: A block whose pending writes keep more than this fraction of its own bytes in memory is loaded for them.
PENDING_FRACTION = 0.25


class Stream:
    """Loads and releases the blocks of a model.

    Args:
        blocks: of the model.
        tensors: the offloaded tensors of each.
        store: of the blocks, in the same order.
        device: where the model computes.
        depth: number of buffers, at least 2; one less than that many blocks are prefetched at a time.
        plan: how this was chosen under a cap, for :meth:`describe`.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[OffloadedTensor]],
        store: Store,
        device: torch.device,
        depth: int = 2,
        plan: OffloadPlan | None = None,
    ) -> None:
        self.blocks, self.store, self.device, self.plan = list(blocks), store, device, plan
        self.pool = BufferPool(self.blocks, store, device, depth)
        self.lock = threading.RLock()
        self.no_state = False
        self._handles: list[Any] = []
        for index, (block, some) in enumerate(zip(self.blocks, tensors, strict=True)):
            block.index, block.tensors = index, list(some)
            for one in block.tensors:
                placement.set_offload_handle(one.tensor, _BlockHandle(self, block))
                one.tensor.data = one.placeholder
            self._hook(block)

    @property
    def traffic(self) -> Traffic:
        return self.pool.traffic

    def _hook(self, block: Block) -> None:
        def before(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled() and any(t.requires_grad for t in [*module.parameters(), *args] if isinstance(t, Tensor)):
                raise ValueError(
                    "no backward pass goes through an offloaded model: train it with a zeroth-order method, or torch.no_grad()."
                )
            self.acquire(block)
            entered.append(True)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if entered:  # empty where something else failed before the block began
                entered.pop()
                self.release(block)

        entered: list[bool] = []
        for module in block.modules:
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        for one in block.tensors:
            if one.owner is not None:
                self._handles.append(one.owner.register_state_dict_post_hook(_StateDictHook(self, one)))
        for module in block.modules:
            self._handles += _loading_hooks(self, block, module)

    # -- access to blocks -----------------------------------------------------------------------------------------------------------

    def acquire(self, block: Block) -> None:
        """The tensors of a block hold their values until :meth:`release`."""
        with self.lock:
            buffer = self.pool.acquire(block)
            if buffer.users == 1:
                for one, view in zip(block.tensors, self.store.layouts[block.index].views(buffer.memory), strict=True):
                    one.tensor.data = view
            try:
                while block.pending:
                    buffer.written = True
                    block.pending.pop(0)()
                block.pending_bytes = 0
            except BaseException:
                self.release(block)
                raise

    def release(self, block: Block) -> None:
        """End one :meth:`acquire` of the block."""
        with self.lock:
            buffer = self.pool.of(block)
            assert buffer is not None and buffer.users > 0
            buffer.users -= 1
            if buffer.users:
                return
            for one in block.tensors:
                one.tensor.data = one.placeholder
            self.pool.release(buffer)

    def mark_written(self, block: Block) -> None:
        """An acquired block has been written."""
        buffer = self.pool.of(block)
        assert buffer is not None and buffer.users
        buffer.written = True

    def write(self, block: Block, work: Callable[[], object], pending_bytes: int) -> None:
        """See :class:`zotune.weights.placement.OffloadHandle`."""
        with self.lock:
            buffer = self.pool.of(block)
            if buffer is not None and buffer.users:
                buffer.written = True
                work()
                return
            block.pending.append(work)
            block.pending_bytes += pending_bytes
            if block.pending_bytes > PENDING_FRACTION * self.store.layouts[block.index].size:
                self._run_pending(block)

    def _run_pending(self, block: Block) -> None:
        self.acquire(block)
        self.release(block)

    def flush(self) -> None:
        """Run all pending writes, and wait until they are saved."""
        for block in self.blocks:
            if block.pending:
                self._run_pending(block)
        self.pool.wait_for_saves()

    def attach(self, block: Block, tensor: Tensor) -> None:
        """See :class:`zotune.weights.placement.OffloadHandle`."""
        with self.lock:
            self.flush()
            self.pool.clear()
            name = f"beside {block.tensors[0].name} {len(block.tensors)}"
            one = OffloadedTensor.of(name, None, "", tensor, self.device)
            self.store.layouts[block.index].add(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
            block.tensors.append(one)
            placement.set_offload_handle(tensor, _BlockHandle(self, block))
            tensor.data = one.placeholder

    # -- the whole model ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def empty_state_dicts(self) -> Iterator[None]:
        """Within the block, state dicts have placeholders for offloaded tensors: no values, no memory."""
        self.no_state = True
        try:
            yield
        finally:
            self.no_state = False

    def measure(self) -> float:
        """Bytes a second at which two blocks load; 0 where both are loaded already."""
        with self.lock:
            before = self.traffic.bytes, self.traffic.transfer
            for block in (self.blocks[0], self.blocks[-1]):
                self._run_pending(block)
            self.pool.wait_for_loads()
        return (self.traffic.bytes - before[0]) / max(self.traffic.transfer - before[1], 1e-9)

    def describe(self) -> str:
        """The blocks, their buffers, and the least time of a pass over the weights."""
        rate = self.measure()
        size = sum(self.store.size(index) for index in range(len(self.blocks)))
        memory = sum(buffer.memory.numel() for buffer in self.pool.buffers)
        chosen = "" if self.plan is None else f"\n{self.plan.describe()}"
        speed = f" at {rate / 1e9:.2f} GB/s: at least {size / rate:.2g} s each" if rate else ""
        return (
            f"offloaded: {len(self.blocks)} blocks stream through {memory / 2**30:.2f} GiB of buffers, {size / 2**30:.2f} GiB a forward "
            f"pass{speed}{chosen}"
        )

    def by_block(self, tensors: Mapping[str, Tensor]) -> list[list[str]]:
        """Names of the offloaded ones of the tensors, a list for each block."""
        found: list[list[str]] = [[] for _ in self.blocks]
        for name, tensor in tensors.items():
            handle = placement.offload_handle(tensor)
            if isinstance(handle, _BlockHandle) and handle.stream is self:
                found[handle.block.index].append(name)
        return found

    def bring_back(self) -> None:
        """End the stream: the model is an ordinary one again, every tensor in memory of its own."""
        self.flush()
        for block in self.blocks:
            wanted = {id(t) for m in block.modules for t in [*m.parameters(), *m.buffers()]}
            present = [one for one in block.tensors if id(one.tensor) in wanted or one.owner is None]
            if present:
                self.acquire(block)
                values = [one.tensor.detach().clone() for one in present]
                self.release(block)
                for one, value in zip(present, values, strict=True):
                    one.tensor.data = value
            for one in block.tensors:
                placement.clear_offload_handle(one.tensor)
        for handle in self._handles:
            handle.remove()
        self.close()

    def close(self) -> None:
        """Stop the threads and release files and memory."""
        self.pool.close()
        self.store.close()


class _BlockHandle:
    """The offload handle of one block's tensors."""

    def __init__(self, stream: Stream, block: Block) -> None:
        self.stream, self.block = stream, block

    @property
    def lossy(self) -> bool:
        return self.stream.store.lossy

    @contextmanager
    def loaded(self) -> Iterator[None]:
        with self.stream.lock:
            self.stream.acquire(self.block)
            try:
                yield
            finally:
                self.stream.release(self.block)

    def write(self, work: Callable[[], object], pending_bytes: int) -> None:
        self.stream.write(self.block, work, pending_bytes)

    def attach(self, tensor: Tensor) -> None:
        self.stream.attach(self.block, tensor)


class _StateDictHook:
    """Puts a tensor's values into a state dict. (A class, because torch sets an attribute on the hook.)"""

    def __init__(self, stream: Stream, one: OffloadedTensor) -> None:
        self.stream, self.local, self.tensor = stream, one.local, weakref.ref(one.tensor)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        tensor = self.tensor()
        if tensor is None or self.stream.no_state or prefix + self.local not in state_dict:
            return
        if module._parameters.get(self.local, module._buffers.get(self.local)) is tensor:
            state_dict[prefix + self.local] = placement.snapshot(tensor)


def _loading_hooks(stream: Stream, block: Block, module: nn.Module) -> list[Any]:
    """Hooks that load a block while a state dict is loaded into it."""
    acquired: list[bool] = []

    def before(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            stream.acquire(block)
            acquired.append(True)

    def after(module: nn.Module, incompatible: Any) -> None:
        if acquired:
            acquired.pop()
            stream.mark_written(block)
            stream.release(block)

    return [module.register_load_state_dict_pre_hook(before), module.register_load_state_dict_post_hook(after)]


def stream_of(model: nn.Module) -> Stream | None:
    """The stream of an offloaded model; None for others."""
    for tensor in [*model.parameters(), *model.buffers()]:
        handle = placement.offload_handle(tensor)
        if isinstance(handle, _BlockHandle):
            return handle.stream
    return None
