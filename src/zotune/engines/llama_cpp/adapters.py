"""Low-rank factors as llama.cpp takes them: a LoRA adapter, a file in memory that is rewritten and loaded again.

The file's header depends on shapes and rank only. It is written once; then only the numbers change.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zotune.engines.gguf.file import Matrix, to_file_rows
from zotune.engines.llama_cpp.library import last_words

#: Where a file in memory is looked for on systems without anonymous ones.
SHARED_MEMORY = Path("/dev/shm")


class AdapterSlot:
    """One loaded adapter of a model, of a fixed rank.

    Args:
        lib: the C library.
        model: its model.
        architecture: of the model, which the adapter's has to be.
        matrices: that have factors, all of them.
        rank: columns of every factor.
    """

    def __init__(self, lib: Any, model: Any, architecture: str, matrices: Mapping[str, Matrix], rank: int) -> None:
        self.lib, self.model, self.rank = lib, model, rank
        self.pointer: Any = None
        self._heads = {name: matrix.heads for name, matrix in matrices.items()}
        header, self._places, size = _layout(architecture, matrices, rank)
        self._file = _MemoryFile(size)
        self._file.memory[: len(header)] = header
        self._numbers = {
            name: (self._view(a, (rank, matrices[name].shape[1])), self._view(b, (matrices[name].shape[0], rank)))
            for name, (a, b) in self._places.items()
        }

    def _view(self, offset: int, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(self._file.memory, np.float32, shape[0] * shape[1], offset).reshape(shape)

    def load(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
        """Have the adapter hold these factors, zeros for other matrices; whether that changed the pointer."""
        changed = self.pointer is None
        for name, (a, b) in self._numbers.items():
            if name in factors:
                left, right = factors[name]
                changed |= _assign(a, right.T.numpy()) | _assign(b, to_file_rows(left.numpy(), self._heads[name]))
            else:
                changed |= _assign(b, np.float32(0))
        if changed:
            before, self.pointer = self.pointer, self.lib.llama_adapter_lora_init(self.model, self._file.path.encode())
            if before is not None:
                self.lib.llama_adapter_lora_free(before)
            if not self.pointer:
                self.pointer = None
                raise ValueError(f"llama.cpp did not take the low-rank factors: {last_words() or 'it gives no reason'}.")
        return changed

    def close(self) -> None:
        """Free the adapter and its file."""
        if self.pointer is not None:
            self.lib.llama_adapter_lora_free(self.pointer)
            self.pointer = None
        self._numbers = {}
        self._file.close()


def _assign(place: np.ndarray, values: Any) -> bool:
    """Copy; whether anything differed."""
    if np.array_equal(place, np.broadcast_to(values, place.shape)):
        return False
    place[...] = values
    return True


def _layout(architecture: str, matrices: Mapping[str, Matrix], rank: int) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """The bytes before the numbers, where each matrix's numbers begin (a, b), and the size of the file."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # without alpha a scale is taken as it is
        sizes = []
        for name, matrix in matrices.items():
            (m, n), tensor = matrix.shape, matrix.tensor
            for suffix, shape in ((".lora_a", (rank, n)), (".lora_b", (m, rank))):
                writer.add_tensor_info(tensor + suffix, shape, np.dtype(np.float32), 4 * shape[0] * shape[1], kinds.F32)
                sizes.append((name, 4 * shape[0] * shape[1]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    offset = -(-len(header) // alignment) * alignment
    starts = []
    for _, size in sizes:
        starts.append(offset)
        offset += -(-size // alignment) * alignment
    names = [name for name, _ in sizes[::2]]
    return header, dict(zip(names, zip(starts[::2], starts[1::2], strict=True), strict=True)), offset


class _MemoryFile:
    """A file without a place on a disk, mapped into memory."""

    def __init__(self, size: int) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
            self._descriptor = os.memfd_create("zotune-adapter")
            self.path = f"/proc/self/fd/{self._descriptor}"
        else:
            self._folder = tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
            self.path = str(Path(self._folder.name) / "adapter.gguf")
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._descriptor, size)
        self.memory = mmap.mmap(self._descriptor, size)

    def close(self) -> None:
        """Give the file's memory back."""
        os.close(self._descriptor)
        if self._folder is not None:
            self._folder.cleanup()
