"""Reading and writing large parts of files without the page cache.

A model that does not fit is read once a step; the page cache would evict everything else for it, and copy it once more. So files are opened
with ``O_DIRECT`` where the system has it, which needs offsets and lengths in multiples of a page; elsewhere their pages are dropped from
the cache after use.
"""

from __future__ import annotations

import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial

import torch
from torch import Tensor

PAGE = 4096
HUGE = 2 << 20
#: Bytes of a call and calls at a time, for the throughput of a solid-state disk.
CHUNK = 8 << 20
AT_ONCE = 4
#: Gaps between spans of at most so many bytes are read too.
GAP = 1 << 20


@dataclass(frozen=True)
class Segment:
    """``length`` bytes of a file from ``offset`` on, for position ``place`` of a buffer; multiples of a page, except at a file's end."""

    path: str
    offset: int
    length: int
    place: int


def pages(count: int) -> int:
    """``count`` bytes in whole pages."""
    return -(-count // PAGE) * PAGE


def page_aligned(count: int, pinned: bool = False) -> Tensor:
    """Memory of at least ``count`` bytes that starts at a page, uint8."""
    if pinned:
        memory = torch.empty(pages(count) + PAGE, dtype=torch.uint8, pin_memory=True)
        return memory[-memory.data_ptr() % PAGE :][: pages(count)]
    mapped = mmap.mmap(-1, pages(count) + HUGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE
    if hasattr(mmap, "MADV_HUGEPAGE") and count >= HUGE:  # fewer pages for the device and the kernel
        with suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return memory[begin:][: pages(count)]


def plan_reads(spans: list[tuple[str, int, int]], gap: int = GAP) -> tuple[list[Segment], list[int], int]:
    """How to read spans (path, offset, bytes) of files: (segments, position of each span in the buffer, bytes of the buffer)."""
    segments: list[Segment] = []
    places = [0] * len(spans)
    end = 0
    for index in sorted(range(len(spans)), key=lambda i: spans[i][:2]):
        path, offset, count = spans[index]
        start, stop = offset // PAGE * PAGE, pages(offset + count)
        last = segments[-1] if segments else None
        if last is not None and last.path == path and start <= last.offset + last.length + gap:
            stop = max(stop, last.offset + last.length)
            segments[-1] = last = Segment(path, last.offset, stop - last.offset, last.place)
        else:
            last = Segment(path, start, stop - start, end)
            segments.append(last)
        places[index] = last.place + offset - last.offset
        end = last.place + last.length
    return segments, places, end


class DirectFiles:
    """Open files, by path, and the threads that read them.

    ``chunk``: bytes of a call, at most.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self._descriptors: dict[str, tuple[int, bool]] = {}
        self._closing = weakref.finalize(self, _close, self._descriptors)
        self._readers = ThreadPoolExecutor(AT_ONCE, "zotune-read")

    def adopt(self, path: str, descriptor: int) -> None:
        """Register an open file under a name of its own."""
        self._descriptors[path] = descriptor, _direct(descriptor)

    def _open(self, path: str) -> tuple[int, bool]:
        found = self._descriptors.get(path)
        if found is None:
            descriptor = os.open(path, os.O_RDONLY)
            found = self._descriptors[path] = descriptor, _direct(descriptor)
        return found

    def read(self, segments: list[Segment], into: Tensor) -> None:
        """Fill a buffer (uint8, from :func:`page_aligned`)."""
        bytes_ = _bytes(into)
        list(self._readers.map(partial(self._read, bytes_), _chunks(segments, self.chunk)))

    def _read(self, bytes_: memoryview, chunk: Segment) -> None:
        path, offset, length, place = astuple(chunk)
        descriptor, direct = self._open(path)
        done = 0
        while done < length:
            count = os.preadv(descriptor, [bytes_[place + done : place + length]], offset + done)
            done += count
            if count == 0 or count % PAGE:
                break  # the end of the file
        if not direct:
            _drop_pages(descriptor, offset, length)

    def write(self, path: str, offset: int, source: Tensor) -> None:
        """Write a buffer to an adopted file."""
        descriptor, direct = self._open(path)
        bytes_ = _bytes(source)
        done = 0
        while done < len(bytes_):
            done += os.pwritev(descriptor, [bytes_[done : done + self.chunk]], offset + done)
        if not direct:
            _drop_pages(descriptor, offset, len(bytes_))

    def close(self) -> None:
        self._readers.shutdown()
        self._closing()


def _close(descriptors: dict[str, tuple[int, bool]]) -> None:
    for descriptor, _ in descriptors.values():
        os.close(descriptor)
    descriptors.clear()


def _chunks(segments: list[Segment], size: int) -> list[Segment]:
    return [
        Segment(s.path, s.offset + first, min(size, s.length - first), s.place + first)
        for s in segments
        for first in range(0, s.length, size)
    ]


def _bytes(buffer: Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]


def _direct(descriptor: int) -> bool:
    """Turn off the page cache for a file, if supported; whether it is."""
    try:
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
        trial = page_aligned(PAGE)
        os.preadv(descriptor, [_bytes(trial)], 0)
        return True
    except (ImportError, AttributeError):  # not on this system
        return False
    except OSError:  # nor on this file system
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        return False


def _drop_pages(descriptor: int, offset: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
