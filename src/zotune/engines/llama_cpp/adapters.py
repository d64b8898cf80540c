"""Low-rank factors as llama.cpp takes them: a LoRA adapter, loaded from a file in memory, whose numbers change from point to point."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zotune.engines.engine import Factors
from zotune.engines.gguf.file import Matrix, to_file_rows
from zotune.engines.llama_cpp.library import Tensors, last_words, raising

#: Ranks are filled up with zeros to a multiple of this: so llama.cpp takes its fast kernels for the thin products (a forward of a model of
#: 7 M parameters takes 1.35 times as long with an adapter of rank 2, and 1.07 times with one of rank 8).
GRAIN = 8
ZERO = np.zeros((), np.float32)
#: Where a file in memory is looked for on systems without anonymous ones.
SHARED_MEMORY = Path("/dev/shm")


class Adapter:
    """A loaded adapter of a model, of fixed ranks.

    The file is loaded once. As soon as an evaluation has shown where llama.cpp keeps the adapter's tensors, other numbers are put there.
    There is one adapter at a time: llama.cpp adds several in the order of their addresses, which differs from process to process.

    Args:
        lib: the C library.
        model: its model.
        architecture: of the model, which the adapter's has to be.
        matrices: that have factors.
        ranks: columns of the factors, by name; the adapter's are :func:`padded`.
        tensors: writes them.

    Attributes:
        pointer: llama.cpp's.
        places: addresses of the tensors, by name in the file; filled by whoever watches an evaluation.
    """

    def __init__(
        self, lib: Any, model: Any, architecture: str, matrices: Mapping[str, Matrix], ranks: Mapping[str, int], tensors: Tensors
    ) -> None:
        self.lib, self.model, self.ranks, self.tensors = lib, model, padded(ranks), tensors
        self.pointer: Any = None
        self.places: dict[bytes, int] = {}
        self._matrices = {name: matrices[name] for name in ranks}
        header, places, size = _layout(architecture, self._matrices, self.ranks)
        self._file = _MemoryFile(size)
        self._file.memory[: len(header)] = header
        self._numbers: dict[bytes, np.ndarray] = {}
        for name, matrix in self._matrices.items():
            (m, n), rank, (a, b) = matrix.shape, self.ranks[name], places[name]
            self._numbers[f"{matrix.tensor}.lora_a".encode()] = self._view(a, (rank, n))
            self._numbers[f"{matrix.tensor}.lora_b".encode()] = self._view(b, (m, rank))
        self._folded: dict[str, Tensor] = {}
        self._changed: set[bytes] = set()  # tensors whose numbers in the file are not loaded yet

    def _view(self, offset: int, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(self._file.memory, np.float32, shape[0] * shape[1], offset).reshape(shape)

    @property
    def unseen(self) -> set[bytes]:
        """Names of the tensors whose places are not known yet."""
        return self._numbers.keys() - self.places.keys()

    def refuse_unseen(self) -> None:
        """ValueError where an evaluation did not use some of the factors."""
        unused = sorted({name.rpartition(b".lora_")[0].decode() for name in self.unseen})
        raise ValueError(
            f"llama.cpp adds no low-rank factors to {unused[0]}{f' and {len(unused) - 1} more' if len(unused) > 1 else ''} of this model: "
            "leave them out with --trainable (names or patterns of what to train)."
        )

    def set(self, folded: Factors, current: Factors) -> None:
        """Have the adapter hold these factors, side by side."""
        for name, matrix in self._matrices.items():
            a, b = f"{matrix.tensor}.lora_a".encode(), f"{matrix.tensor}.lora_b".encode()
            columns = 0
            for factors in (folded, current):
                if name not in factors:
                    continue
                left, right = factors[name]
                place = slice(columns, columns + left.shape[1])
                columns += left.shape[1]
                if factors is folded and self._folded.get(name) is left:
                    continue
                self._assign(a, self._numbers[a][place], right.T.numpy())
                self._assign(b, self._numbers[b][:, place], to_file_rows(left.numpy(), matrix.heads))
                if factors is folded:
                    self._folded[name] = left
            if name not in folded:
                self._folded.pop(name, None)
            self._assign(a, self._numbers[a][columns:], ZERO)
            self._assign(b, self._numbers[b][:, columns:], ZERO)
        if self.pointer is not None and not self.unseen:
            for tensor in sorted(self._changed):
                self.tensors.write(self.places[tensor], self._numbers[tensor])
        elif self.pointer is None or self._changed:
            self._load()
        self._changed.clear()

    def _assign(self, tensor: bytes, place: np.ndarray, values: np.ndarray) -> None:
        if not (place == values).all():
            self._changed.add(tensor)  # first, in case that the copy is interrupted
            place[...] = values

    def _load(self) -> None:
        self._free()
        with raising():
            self.pointer = self.lib.llama_adapter_lora_init(self.model, self._file.path.encode()) or None
        if self.pointer is None:
            raise ValueError(f"llama.cpp did not take the low-rank factors: {last_words() or 'it gives no reason'}.")

    def _free(self) -> None:
        pointer, self.pointer = self.pointer, None  # first: after an interrupt nothing may use or free it again
        self.places.clear()
        if pointer is not None:
            with raising():
                self.lib.llama_adapter_lora_free(pointer)

    def close(self) -> None:
        """Free the adapter and its file."""
        self._free()
        self._numbers = {}
        self._file.close()


def padded(ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks of an adapter for factors of so many columns."""
    return {name: -(-columns // GRAIN) * GRAIN for name, columns in ranks.items()}


def _layout(architecture: str, matrices: Mapping[str, Matrix], ranks: Mapping[str, int]) -> tuple[bytes, dict[str, tuple[int, int]], int]:
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
            (m, n), tensor, rank = matrix.shape, matrix.tensor, ranks[name]
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
        self.memory.close()
        os.close(self._descriptor)
        if self._folder is not None:
            self._folder.cleanup()
