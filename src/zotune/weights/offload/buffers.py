"""Device buffers of offloaded blocks: a worker thread prefetches the blocks that come next and saves those that were written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.weights.offload import direct_io
from zotune.weights.offload.blocks import Block
from zotune.weights.offload.stores import Store


@dataclass(eq=False)
class Buffer:
    """Memory of one block.

    Attributes:
        loading: completes when ``block`` is in ``memory``.
        users: how many acquisitions use the block now.
        written: whether it has to be saved.
        last_used: a counter of requests.
        free: a CUDA event after the last computation with it.
    """

    memory: Tensor
    block: Block | None = None
    loading: Future[None] | None = None
    users: int = 0
    written: bool = False
    last_used: int = 0
    free: Any = None


@dataclass
class Traffic:
    """Transfers so far: blocks and bytes loaded, bytes written, seconds of computation that waited, seconds of transfers."""

    blocks: int = 0
    bytes: int = 0
    written: int = 0
    waited: float = 0.0
    transfer: float = 0.0


class BufferPool:
    """``depth`` buffers for the blocks of a store; not thread-safe.

    Args:
        blocks: in the order of the store.
        depth: at least 2; one less than that many blocks are prefetched at a time.
    """

    def __init__(self, blocks: Sequence[Block], store: Store, device: torch.device, depth: int) -> None:
        assert depth >= 2
        self.blocks, self.store, self.device, self.depth = blocks, store, device, depth
        self.buffers: list[Buffer] = []
        self.traffic = Traffic()
        self._next = {index: (index + 1) % len(blocks) for index in range(len(blocks))}  # which block followed each, the last time
        self._last: int | None = None
        self._requests = 0
        self._worker = ThreadPoolExecutor(1, "zotune-offload")
        self._saves: list[Future[None]] = []
        self._cuda_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def of(self, block: Block) -> Buffer | None:
        """The buffer of a block, loaded or loading."""
        return next((buffer for buffer in self.buffers if buffer.block is block), None)

    def acquire(self, block: Block) -> Buffer:
        """The buffer of a block, once loaded; prefetches the blocks that are likely to follow."""
        while self._saves and self._saves[0].done():
            self._saves.pop(0).result()  # raises what failed
        buffer = self.of(block)
        if buffer is None:
            buffer = self._vacant()
            self._fill(buffer, block)
        buffer.users += 1
        if self._last is not None:
            self._next[self._last] = block.index
        self._last = block.index
        self._requests += 1
        buffer.last_used = self._requests
        self._prefetch(block)
        assert buffer.loading is not None
        begin = time.perf_counter()
        try:
            buffer.loading.result()
        except BaseException:
            buffer.users, buffer.block, buffer.loading = 0, None, None
            raise
        self.traffic.waited += time.perf_counter() - begin
        return buffer

    def release(self, buffer: Buffer) -> None:
        """Nobody uses the buffer: save the block if it was written."""
        assert buffer.block is not None and not buffer.users
        if self._cuda_stream is not None:
            buffer.free = torch.cuda.Event()
            buffer.free.record(torch.cuda.current_stream(self.device))
        if buffer.written:
            buffer.written = False
            self.traffic.written += self.store.layouts[buffer.block.index].size
            self._saves.append(self._worker.submit(self._save, buffer, buffer.block.index))

    def wait_for_loads(self) -> None:
        for buffer in self.buffers:
            if buffer.loading is not None:
                buffer.loading.result()

    def wait_for_saves(self) -> None:
        for save in self._saves:
            save.result()
        self._saves.clear()

    def clear(self) -> None:
        """Free the buffers: layouts have changed."""
        assert not any(buffer.users for buffer in self.buffers)
        self.wait_for_loads()
        self.buffers.clear()

    def close(self) -> None:
        """Stop the thread and free the buffers."""
        self._worker.shutdown()
        self.buffers.clear()

    def _vacant(self) -> Buffer:
        """The least recently used of the buffers without users."""
        if not self.buffers:
            size = max(layout.size for layout in self.store.layouts)
            for _ in range(min(self.depth, max(2, len(self.blocks)))):
                if self._cuda_stream is None:
                    memory = direct_io.page_aligned(size)
                else:
                    memory = torch.empty(direct_io.pages(size), dtype=torch.uint8, device=self.device)
                self.buffers.append(Buffer(memory))
        free = [buffer for buffer in self.buffers if not buffer.users]
        assert free, "more blocks are in use at once than there are buffers"
        return min(free, key=lambda buffer: buffer.last_used)

    def _prefetch(self, block: Block) -> None:
        """Load the blocks that followed the last time into buffers without users."""
        index = block.index
        wanted = [block]
        for _ in range(len(self.buffers) - 1):
            index = self._next[index]
            following = self.blocks[index]
            if any(following is one for one in wanted):
                return
            wanted.append(following)
            if self.of(following) is None:
                free = [buffer for buffer in self.buffers if not buffer.users and not any(buffer.block is one for one in wanted)]
                if not free:
                    return
                self._fill(min(free, key=lambda buffer: buffer.last_used), following)

    def _fill(self, buffer: Buffer, block: Block) -> None:
        self._requests += 1
        buffer.block, buffer.last_used = block, self._requests
        buffer.loading = self._worker.submit(self._load, buffer, block.index)

    # -- in the worker's thread -----------------------------------------------------------------------------------------------------

    def _load(self, buffer: Buffer, index: int) -> None:
        begin = time.perf_counter()
        with self._transferring(buffer):
            self.store.load(index, buffer.memory)
        self.traffic.transfer += time.perf_counter() - begin
        self.traffic.blocks += 1
        self.traffic.bytes += self.store.size(index)

    def _save(self, buffer: Buffer, index: int) -> None:
        with self._transferring(buffer):
            self.store.save(index, buffer.memory)

    @contextmanager
    def _transferring(self, buffer: Buffer) -> Iterator[None]:
        """Copies on a CUDA stream of their own, after the computations with the buffer, complete at the end."""
        with torch.no_grad():
            if self._cuda_stream is None:
                yield
                return
            with torch.cuda.stream(self._cuda_stream):
                if buffer.free is not None:
                    self._cuda_stream.wait_event(buffer.free)
                yield
                self._cuda_stream.synchronize()
