"""Where offloaded blocks are stored: in host memory, or on disk.

A store loads a block's tensors into one buffer of bytes and saves written ones from it. On disk, unchanged blocks are read from the model's
safetensors shards, written ones from an unlinked scratch file, which vanishes with the process.
"""

from __future__ import annotations

import abc
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zotune.weights.offload import direct_io
from zotune.weights.offload.direct_io import DirectFiles, Segment

#: Alignment of tensors in a buffer, in bytes.
ALIGNED = 64


class FileSpan(NamedTuple):
    """A tensor's bytes in a file, of dtype ``dtype``."""

    path: str
    offset: int
    nbytes: int
    dtype: torch.dtype


class TensorSpec(NamedTuple):
    """A tensor as loaded."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * torch.empty(0, dtype=self.dtype).element_size()


@dataclass
class Layout:
    """Positions of a block's tensors in a buffer of ``size`` bytes."""

    specs: list[TensorSpec]
    places: list[int]
    size: int

    @classmethod
    def packed(cls, specs: Sequence[TensorSpec]) -> Layout:
        layout = cls([], [], 0)
        for spec in specs:
            layout.add(spec)
        return layout

    def add(self, spec: TensorSpec) -> None:
        self.specs.append(spec)
        self.places.append(-(-self.size // ALIGNED) * ALIGNED)
        self.size = self.places[-1] + spec.nbytes

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer."""
        return [
            buffer[place : place + spec.nbytes].view(spec.dtype).view(spec.shape)
            for spec, place in zip(self.specs, self.places, strict=True)
        ]


class Store(abc.ABC):
    """Stores blocks, by number.

    Attributes:
        layouts: of each block in a buffer; tensors may be added before the block is first loaded.
        lossy: whether the stored dtypes have fewer bits than the tensors'.
    """

    lossy = False

    def __init__(self) -> None:
        self.layouts: list[Layout] = []

    @abc.abstractmethod
    def load(self, block: int, buffer: Tensor) -> None:
        """Load a block into a buffer; returns when complete."""

    @abc.abstractmethod
    def save(self, block: int, buffer: Tensor) -> None:
        """Replace the block by a buffer's contents."""

    @abc.abstractmethod
    def size(self, block: int) -> int:
        """Bytes transferred for a block."""

    @abc.abstractmethod
    def close(self) -> None: ...


class HostStore(Store):
    """Blocks in host memory, pinned where they go to an accelerator, each in one piece.

    Args:
        blocks: (spec, value) of the tensors of each block; the values are copied.
        device: that computes.
        dtype: store floating-point tensors in this dtype (None: their own): rounded once, half the transfer.
    """

    def __init__(
        self, blocks: Sequence[Sequence[tuple[TensorSpec, Tensor]]], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._pinned = device.type == "cuda"
        self._stored: list[Layout] = []
        self._memory: list[Tensor] = []
        for block in blocks:
            specs = [spec for spec, _ in block]
            kept = [spec._replace(dtype=dtype) if dtype is not None and spec.dtype.is_floating_point else spec for spec in specs]
            self.lossy |= any(a.dtype.itemsize < b.dtype.itemsize for a, b in zip(kept, specs, strict=True))
            self.layouts.append(Layout.packed(specs))
            self._stored.append(Layout.packed(kept))
            memory = torch.empty(self._stored[-1].size, dtype=torch.uint8, pin_memory=self._pinned)
            self._memory.append(memory)
            for view, (_, value) in zip(self._stored[-1].views(memory), block, strict=True):
                view.copy_(value)

    def load(self, block: int, buffer: Tensor) -> None:
        self._grow(block)
        if self._stored[block].specs == self.layouts[block].specs:
            buffer[: len(self._memory[block])].copy_(self._memory[block], non_blocking=True)
            return
        for view, stored in zip(self.layouts[block].views(buffer), self._stored[block].views(self._memory[block]), strict=True):
            view.copy_(stored, non_blocking=True)

    def _grow(self, block: int) -> None:
        missing = self.layouts[block].specs[len(self._stored[block].specs) :]
        if missing:
            for spec in missing:
                self._stored[block].add(spec)
            memory = torch.zeros(self._stored[block].size, dtype=torch.uint8, pin_memory=self._pinned)
            memory[: len(self._memory[block])] = self._memory[block]
            self._memory[block] = memory

    def save(self, block: int, buffer: Tensor) -> None:
        assert not self.lossy, "a lossy store is read-only"
        self._memory[block].copy_(buffer[: len(self._memory[block])], non_blocking=True)

    def size(self, block: int) -> int:
        return self._stored[block].size

    def close(self) -> None:
        self._memory.clear()


@dataclass
class _OnDisk:
    """How a block is read: from its shards, or from the scratch file once written."""

    segments: list[Segment]
    places: list[int]
    stored: list[torch.dtype]
    size: int
    count: int  # tensors on disk; those added later are zeros
    verbatim: bool  # the shards' bytes are the tensors
    scratch_offset: int | None = None  # in the scratch file, once written


class DiskStore(Store):
    """Blocks in safetensors shards, and in a scratch file where they have changed.

    Args:
        blocks: the specs of each block's tensors.
        where: the file span of each, by name.
        device: that computes.
        scratch: folder for the scratch file (None: the system's temporary one), which grows to the size of the trained blocks.
    """

    def __init__(
        self, blocks: Sequence[Sequence[TensorSpec]], where: Mapping[str, FileSpan], device: torch.device, scratch: str | Path | None = None
    ) -> None:
        super().__init__()
        self._blocks: list[_OnDisk] = []
        self._device, self._folder = device, scratch
        self._files = DirectFiles()
        self._staging: Tensor | None = None
        self._scratch: str | None = None
        self._end = 0
        for specs in blocks:
            places = [where[spec.name] for spec in specs]
            segments, offsets, size = direct_io.plan_reads([(p.path, p.offset, p.nbytes) for p in places])
            equal = all(p.dtype == spec.dtype for p, spec in zip(places, specs, strict=True))
            aligned = all(offset % spec.dtype.itemsize == 0 for offset, spec in zip(offsets, specs, strict=True))
            verbatim = equal and aligned and device.type == "cpu"
            self._blocks.append(_OnDisk(segments, offsets, [p.dtype for p in places], size, len(specs), verbatim))
            self.layouts.append(Layout(list(specs), list(offsets), size) if verbatim else Layout.packed(specs))

    @classmethod
    def of_values(
        cls, blocks: Sequence[Sequence[tuple[TensorSpec, Tensor]]], device: torch.device, scratch: str | Path | None = None
    ) -> DiskStore:
        """A store of blocks that are in memory."""
        store = cls([], {}, device, scratch)
        for index, block in enumerate(blocks):
            layout = Layout.packed([spec for spec, _ in block])
            store.layouts.append(layout)
            store._blocks.append(_OnDisk([], [], [], layout.size, len(block), verbatim=True))
            memory = direct_io.page_aligned(layout.size)
            for view, (_, value) in zip(layout.views(memory), block, strict=True):
                view.copy_(value)
            store.save(index, memory)
        return store

    def load(self, block: int, buffer: Tensor) -> None:
        layout, on_disk = self.layouts[block], self._blocks[block]
        views = layout.views(buffer)
        if on_disk.scratch_offset is not None:
            there = self._staged(on_disk.size, buffer)
            self._files.read([Segment(self._scratch or "", on_disk.scratch_offset, direct_io.pages(on_disk.size), 0)], there)
            if there is not buffer:
                buffer[: on_disk.size].copy_(there[: on_disk.size], non_blocking=True)
        elif on_disk.verbatim:
            self._files.read(on_disk.segments, buffer)
        else:
            there = self._staging_of(on_disk.size)
            self._files.read(on_disk.segments, there)
            for view, spec, place, dtype in zip(views, layout.specs, on_disk.places, on_disk.stored, strict=False):
                count = view.numel() * dtype.itemsize
                view.copy_(there[place : place + count].view(dtype).view(spec.shape), non_blocking=True)
        for view in views[on_disk.count :]:
            view.zero_()

    def save(self, block: int, buffer: Tensor) -> None:
        layout, on_disk = self.layouts[block], self._blocks[block]
        if on_disk.scratch_offset is None or on_disk.count < len(layout.specs):
            on_disk.scratch_offset, on_disk.size, on_disk.count = self._end, layout.size, len(layout.specs)
            self._end += direct_io.pages(layout.size)
        if self._scratch is None:
            self._scratch = self._new_scratch()
        here = self._staged(layout.size, buffer)
        if here is not buffer:
            here[: layout.size].copy_(buffer[: layout.size])
        self._files.write(self._scratch, on_disk.scratch_offset, here[: direct_io.pages(layout.size)])

    def _new_scratch(self) -> str:
        descriptor, path = tempfile.mkstemp(prefix="zotune-", suffix=".scratch", dir=self._folder)
        os.unlink(path)
        self._files.adopt(path, descriptor)
        return path

    def _staged(self, size: int, buffer: Tensor) -> Tensor:
        """Host memory for reading and writing files: the buffer itself, or a staging one."""
        return buffer if self._device.type == "cpu" else self._staging_of(size)

    def _staging_of(self, size: int) -> Tensor:
        if self._staging is None or len(self._staging) < size:
            self._staging = direct_io.page_aligned(size, pinned=self._device.type == "cuda")
        return self._staging

    def size(self, block: int) -> int:
        on_disk = self._blocks[block]
        return on_disk.size if on_disk.scratch_offset is not None else sum(segment.length for segment in on_disk.segments)

    def close(self) -> None:
        self._files.close()
