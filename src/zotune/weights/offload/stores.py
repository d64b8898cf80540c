"""Where blocks are kept while they are away: in host memory, or on disk.

A block's tensors lie in one *room*, a stretch of bytes; a store fills rooms and takes back what was written in one. On disk there are two
places: the safetensors shards that the model came in, which are only read, and a scratch file for blocks that have changed, which has no
name and vanishes with the process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zotune.weights.offload import direct_io
from zotune.weights.offload.direct_io import Files, Segment

#: What tensors of a room begin at a multiple of; all that a kernel may want.
ALIGNED = 64


class Place(NamedTuple):
    """A tensor's bytes in a file, of dtype ``dtype``."""

    path: str
    offset: int
    nbytes: int
    dtype: torch.dtype


class Form(NamedTuple):
    """What a tensor is like when it is here."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * torch.empty(0, dtype=self.dtype).element_size()


@dataclass
class Layout:
    """Where the tensors of a block lie in a room of ``size`` bytes."""

    forms: list[Form]
    places: list[int]
    size: int

    @classmethod
    def packed(cls, forms: Sequence[Form]) -> Layout:
        layout = cls([], [], 0)
        for form in forms:
            layout.add(form)
        return layout

    def add(self, form: Form) -> None:
        self.forms.append(form)
        self.places.append(-(-self.size // ALIGNED) * ALIGNED)
        self.size = self.places[-1] + form.nbytes

    def views(self, room: Tensor) -> list[Tensor]:
        """The tensors in a room."""
        return [
            room[place : place + form.nbytes].view(form.dtype).view(form.shape) for form, place in zip(self.forms, self.places, strict=True)
        ]


class Store(Protocol):
    """Keeps blocks, by number.

    Attributes:
        layouts: of each block, as :meth:`load` fills a room; tensors may be added to it before the block is first loaded.
        staging: bytes of host memory that a transfer to an accelerator needs.
        rounds: whether fewer bits are kept than the tensors have.
    """

    layouts: list[Layout]
    lossy: bool

    def load(self, block: int, room: Tensor) -> None:
        """Fill a room with a block; returns when it is filled."""
        ...

    def save(self, block: int, room: Tensor) -> None:
        """Keep what a room holds as the block from now on."""
        ...

    def size(self, block: int) -> int:
        """Bytes that come over the link for a block."""
        ...

    def close(self) -> None: ...


class HostStore:
    """Blocks in host memory, pinned where they go to an accelerator, each in one piece.

    Args:
        blocks: (form, value) of the tensors of each block; the values may be let go of afterwards.
        device: where they go.
        dtype: floating-point tensors are kept in this dtype (None: in their own), which rounds them once and halves the link's work.
    """

    def __init__(self, blocks: Sequence[Sequence[tuple[Form, Tensor]]], device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._pinned = device.type == "cuda"
        self.lossy = False
        self.layouts, self._kept, self._memory = [], [], []
        for block in blocks:
            forms = [form for form, _ in block]
            kept = [form._replace(dtype=dtype) if dtype is not None and form.dtype.is_floating_point else form for form in forms]
            self.lossy |= any(a.dtype.itemsize < b.dtype.itemsize for a, b in zip(kept, forms, strict=True))
            self.layouts.append(Layout.packed(forms))
            self._kept.append(Layout.packed(kept))
            memory = torch.empty(self._kept[-1].size, dtype=torch.uint8, pin_memory=self._pinned)
            self._memory.append(memory)
            for view, (_, value) in zip(self._kept[-1].views(memory), block, strict=True):
                view.copy_(value)

    def load(self, block: int, room: Tensor) -> None:
        self._grow(block)
        if self._kept[block].forms == self.layouts[block].forms:
            room[: len(self._memory[block])].copy_(self._memory[block], non_blocking=True)
            return
        for view, kept in zip(self.layouts[block].views(room), self._kept[block].views(self._memory[block]), strict=True):
            view.copy_(kept, non_blocking=True)

    def _grow(self, block: int) -> None:
        missing = self.layouts[block].forms[len(self._kept[block].forms) :]
        if missing:
            for form in missing:
                self._kept[block].add(form)
            memory = torch.zeros(self._kept[block].size, dtype=torch.uint8, pin_memory=self._pinned)
            memory[: len(self._memory[block])] = self._memory[block]
            self._memory[block] = memory

    def save(self, block: int, room: Tensor) -> None:
        assert not self.lossy, "what has lost bits is only read"
        self._memory[block].copy_(room[: len(self._memory[block])], non_blocking=True)

    def size(self, block: int) -> int:
        return self._kept[block].size

    def close(self) -> None:
        self._memory.clear()


@dataclass
class _OnDisk:
    """How a block is read: as it lies in its shards, or from the scratch file once it has changed."""

    segments: list[Segment]
    places: list[int]
    stored: list[torch.dtype]
    size: int
    held: int  # how many of the block's tensors that is; those added later are zeros so far
    as_it_is: bool  # whether the shards' bytes are the tensors
    changed: int | None = None  # where in the scratch file it begins


class DiskStore:
    """Blocks in safetensors shards, and in a scratch file where they have changed.

    Args:
        blocks: the forms of each block's tensors.
        where: the place of each of them, by name.
        device: where they go.
        scratch: folder for the scratch file (None: the system's for temporary files); as large as what is trained.
    """

    def __init__(
        self, blocks: Sequence[Sequence[Form]], where: Mapping[str, Place], device: torch.device, scratch: str | Path | None = None
    ) -> None:
        self.lossy = False
        self.layouts, self._blocks = [], []
        self._device, self._folder = device, scratch
        self._files = Files()
        self._staging: Tensor | None = None
        self._scratch: str | None = None
        self._end = 0
        for forms in blocks:
            places = [where[form.name] for form in forms]
            segments, offsets, size = direct_io.plan([(p.path, p.offset, p.nbytes) for p in places])
            equal = all(p.dtype == form.dtype for p, form in zip(places, forms, strict=True))
            aligned = all(offset % form.dtype.itemsize == 0 for offset, form in zip(offsets, forms, strict=True))
            as_it_is = equal and aligned and device.type == "cpu"
            self._blocks.append(_OnDisk(segments, offsets, [p.dtype for p in places], size, len(forms), as_it_is))
            self.layouts.append(Layout(list(forms), list(offsets), size) if as_it_is else Layout.packed(forms))

    @classmethod
    def of_values(
        cls, blocks: Sequence[Sequence[tuple[Form, Tensor]]], device: torch.device, scratch: str | Path | None = None
    ) -> DiskStore:
        """A store of blocks that are in memory so far."""
        store = cls([], {}, device, scratch)
        for index, block in enumerate(blocks):
            layout = Layout.packed([form for form, _ in block])
            store.layouts.append(layout)
            store._blocks.append(_OnDisk([], [], [], layout.size, len(block), as_it_is=True))
            memory = direct_io.room(layout.size)
            for view, (_, value) in zip(layout.views(memory), block, strict=True):
                view.copy_(value)
            store.save(index, memory)
        return store

    def load(self, block: int, room: Tensor) -> None:
        layout, on_disk = self.layouts[block], self._blocks[block]
        views = layout.views(room)
        if on_disk.changed is not None:
            there = self._staged(on_disk.size, room)
            self._files.read([Segment(self._scratch or "", on_disk.changed, direct_io.pages(on_disk.size), 0)], there)
            if there is not room:
                room[: on_disk.size].copy_(there[: on_disk.size], non_blocking=True)
        elif on_disk.as_it_is:
            self._files.read(on_disk.segments, room)
        else:
            there = self._staging_of(on_disk.size)
            self._files.read(on_disk.segments, there)
            for view, form, place, dtype in zip(views, layout.forms, on_disk.places, on_disk.stored, strict=False):
                count = view.numel() * dtype.itemsize
                view.copy_(there[place : place + count].view(dtype).view(form.shape), non_blocking=True)
        for view in views[on_disk.held :]:
            view.zero_()

    def save(self, block: int, room: Tensor) -> None:
        layout, on_disk = self.layouts[block], self._blocks[block]
        if on_disk.changed is None or on_disk.held < len(layout.forms):
            on_disk.changed, on_disk.size, on_disk.held = self._end, layout.size, len(layout.forms)
            self._end += direct_io.pages(layout.size)
        if self._scratch is None:
            self._scratch = self._new_scratch()
        here = self._staged(layout.size, room)
        if here is not room:
            here[: layout.size].copy_(room[: layout.size])
        self._files.write(self._scratch, on_disk.changed, here[: direct_io.pages(layout.size)])

    def _new_scratch(self) -> str:
        descriptor, path = tempfile.mkstemp(prefix="zotune-", suffix=".scratch", dir=self._folder)
        os.unlink(path)
        self._files.adopt(path, descriptor)
        return path

    def _staged(self, size: int, room: Tensor) -> Tensor:
        """A room that files can be read into: the given one, or one in host memory."""
        return room if self._device.type == "cpu" else self._staging_of(size)

    def _staging_of(self, size: int) -> Tensor:
        if self._staging is None or len(self._staging) < size:
            self._staging = direct_io.room(size, pinned=self._device.type == "cuda")
        return self._staging

    def size(self, block: int) -> int:
        on_disk = self._blocks[block]
        return on_disk.size if on_disk.changed is not None else sum(segment.length for segment in on_disk.segments)

    def close(self) -> None:
        self._files.close()
