"""The header of one GGUF file: metadata and where each tensor lies, without reading a weight.

`gguf.GGUFReader` trusts counts and lengths of the file and unpacks every array of it; this reads a file from anyone, in time and memory
bounded by its size, and leaves long arrays where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: Most entries of an array of strings (the longest vocabularies have 2¹⁸), of metadata, tensors, bytes of a name, dimensions of a tensor.
LONGEST_LIST, MOST_VALUES, MOST_TENSORS, LONGEST_NAME, MOST_DIMENSIONS = 2**22, 2**16, 2**17, 2**16, 4
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_TYPES = frozenset(int(kind) for kind in gguf.GGML_QUANT_SIZES)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Args:
        name: in the file, such as ``blk.0.attn_q.weight``.
        type: how its numbers are stored.
        shape: in torch's order, rows first.
        data: the file's bytes of it, memory-mapped.
    """

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last dimension)."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size


def dequantized(tensor: Tensor, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Rows of a matrix in float32, (rows, n), without dequantizing the others.

    Raises:
        ValueError: the installed gguf cannot dequantize the tensor's type.
    """
    data = tensor.data.reshape(tensor.shape[0], tensor.row_bytes)[rows]
    if tensor.type == gguf.GGMLQuantizationType.F32:
        return data.view(np.float32)
    if tensor.type == gguf.GGMLQuantizationType.F16:
        return data.view(np.float16).astype(np.float32)
    try:
        return gguf.dequantize(data, tensor.type)
    except NotImplementedError:
        raise ValueError(f"{tensor.name} is stored as {tensor.type.name}, which the installed gguf cannot decode: update gguf.") from None


@dataclass(frozen=True)
class _Value:
    """A value that has been stepped over: its type, that of its elements if it is an array, and where it begins."""

    type: int
    count: int | None
    offset: int


class Metadata(Mapping[str, Any]):
    """The metadata of a file; a value is decoded when it is asked for, arrays become lists."""

    def __init__(self, path: Path, content: np.ndarray, values: dict[str, _Value]) -> None:
        self._path, self._content, self._values = path, content, values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        reader = Reader(self._path, self._content, value.offset)
        if value.type == _STRING:
            return reader.text() if value.count is None else [reader.text() for _ in range(value.count)]
        numbers = reader.take(_NUMBERS[value.type], 1 if value.count is None else value.count).tolist()
        return numbers[0] if value.count is None else numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def length(self, key: str) -> int | None:
        """The length of an array, without reading it; None if there is no such array."""
        return self._values[key].count if key in self._values else None


class Reader:
    """Numbers and strings from a place of a file on, none beyond its end."""

    def __init__(self, path: Path, content: np.ndarray, offset: int = 0) -> None:
        self.path, self.content, self.offset = path, content, offset

    def skip(self, size: int) -> int:
        """Steps over so many bytes and says where they begin; ValueError where the file ends before them."""
        start, end = self.offset, self.offset + size
        if end > len(self.content):
            raise ValueError(f"{self.path} is truncated: its header goes on beyond its end ({len(self.content)} bytes); download it again.")
        self.offset = end
        return start

    def take(self, numbers: str, count: int) -> np.ndarray:
        """An array of numbers."""
        size = np.dtype(numbers).itemsize * count
        start = self.skip(size)
        return self.content[start : start + size].view(numbers)

    def integer(self, size: int = 8) -> int:
        """An unsigned integer of 4 or 8 bytes."""
        start = self.skip(size)
        return int.from_bytes(self.content[start : start + size].tobytes(), "little")

    def text(self, longest: int | None = None) -> str:
        """A string in UTF-8, of so many bytes at most."""
        size = self.integer()
        start = self.skip(size)
        if longest is not None and size > longest:
            raise ValueError(f"{self.path} is damaged: a name in its header has {size} bytes; download it again.")
        try:
            return self.content[start : start + size].tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: a text in its header is not UTF-8; download it again.") from None

    def value(self, key: str) -> _Value:
        """A value of the metadata, stepped over."""
        kind, count = self.integer(4), None
        if kind == _ARRAY:
            kind, count = self.integer(4), self.integer()
        value = _Value(kind, count, self.offset)
        if kind == _STRING:
            if (count or 0) > LONGEST_LIST:
                raise ValueError(f"{self.path} is damaged: {_short(key)} is a list of {count} texts; download it again.")
            self._skip_texts(1 if count is None else count)
        elif kind in _NUMBERS:
            self.skip(np.dtype(_NUMBERS[kind]).itemsize * (1 if count is None else count))
        else:
            raise ValueError(f"{self.path} is damaged: {_short(key)} has the unknown type {kind}; download it again.")
        return value

    def _skip_texts(self, count: int) -> None:
        offset, content = self.offset, self.content.data  # a vocabulary has 10⁵ of them
        for _ in range(count):
            offset += 8 + int.from_bytes(content[offset : offset + 8], "little")
        self.skip(offset - self.offset)


class Header:
    """Metadata and tensors of one GGUF file.

    Raises:
        ValueError: it is no GGUF file, truncated, damaged, or of a version or byte order that is not read. The message says what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_is_gguf(path)
        self.content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        reader = Reader(path, self.content, 4)
        version = reader.integer(4)
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise ValueError(f"{path} is a big-endian GGUF: make it little-endian with `gguf-convert-endian {path} little`.")
            raise ValueError(
                f"{path} is a GGUF of version {version}, and versions 2 and 3 are read: convert the model again with a recent llama.cpp."
            )
        tensors, values = reader.integer(), reader.integer()
        for count, most, what in ((values, MOST_VALUES, "entries of metadata"), (tensors, MOST_TENSORS, "tensors")):
            if count > most:
                raise ValueError(f"{path} is damaged: its header counts {count} {what}, and no model has so many; download it again.")
        found: dict[str, _Value] = {}
        for _ in range(values):
            key = reader.text(LONGEST_NAME)
            if key in found:
                raise ValueError(f"{path} is damaged: its metadata names {_short(key)} twice; download it again.")
            found[key] = reader.value(key)
        self.metadata = Metadata(path, self.content, found)
        self.tensors = self._tensors(reader, tensors)

    @cached_property
    def alignment(self) -> int:
        """The multiple of bytes that a tensor begins at."""
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"{self.path} is damaged: general.alignment is {_short(alignment)}, no power of two; download it again.")
        return alignment

    def _tensors(self, reader: Reader, count: int) -> dict[str, Tensor]:
        places = [_place(reader) for _ in range(count)]
        start = next_at = -(-reader.offset // self.alignment) * self.alignment
        tensors: dict[str, Tensor] = {}
        for name, kind, shape, offset in places:
            if name in tensors:
                raise ValueError(f"{self.path} is damaged: it holds the tensor {_short(name)} twice; download it again.")
            if start + offset != next_at:  # they follow each other without gap or overlap, as llama.cpp demands too
                raise ValueError(
                    f"{self.path} is damaged: the tensor {_short(name)} does not begin where the one before it ends; download it again."
                )
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ValueError(
                    f"{self.path} is damaged: rows of {_short(name)} have {shape[-1]} numbers, no multiple of {kind.name}'s {block}."
                )
            length = _product(shape) // block * size
            if next_at + length > len(self.content):
                raise ValueError(
                    f"{self.path} is truncated: {_short(name)} ends beyond its end ({len(self.content)} bytes); download it again."
                )
            tensors[name] = Tensor(name, kind, shape, self.content[next_at : next_at + length])
            next_at += -(-length // self.alignment) * self.alignment
        return tensors


def _place(reader: Reader) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    name, dimensions = reader.text(LONGEST_NAME), reader.integer(4)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"{reader.path} is damaged: the tensor {_short(name)} has {dimensions} dimensions; download it again.")
    shape = tuple(int(size) for size in reader.take("<u8", dimensions)[::-1])
    if not all(shape) or _product(shape) >= 2**63:
        raise ValueError(f"{reader.path} is damaged: the tensor {_short(name)} has the shape {shape}; download it again.")
    kind, offset = reader.integer(4), reader.integer()
    if kind not in _TYPES:
        raise ValueError(
            f"{reader.path} holds {_short(name)} in the type {kind}, which the installed gguf does not know: `pip install -U gguf`."
        )
    return name, gguf.GGMLQuantizationType(kind), shape, offset


def _check_is_gguf(path: Path) -> None:
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.gguf"))
        raise ValueError(
            f"{path} is a folder, no GGUF file: " + (f"give the file {files[0]} in it." if files else "there is no .gguf file in it.")
        )
    if not path.is_file():
        raise ValueError(f"{path} is no GGUF file: " + ("it is no regular file." if path.exists() else "there is no such file."))
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"GGUF":
        return
    if start[:4] == b"FUGG":
        what = "a big-endian GGUF: make it little-endian with `gguf-convert-endian`"
    elif start[:4] in (b"ggml", b"ggjt", b"ggmf", b"lmgg", b"tjgg", b"fmgg"):
        what = "a file of an old llama.cpp: convert the model again with a recent one"
    elif start[8:9] == b"{":
        what = "a safetensors file: convert its folder with `zotune convert`"
    elif start[:2] == b"PK":
        what = "a zip or PyTorch file: convert the checkpoint's folder with `zotune convert`"
    elif start.lstrip().startswith(b"version h"):
        what = "a Git LFS pointer: fetch the file with `git lfs pull`"
    elif start.lstrip()[:1] in (b"{", b"<"):
        what = "a text, perhaps the page of a failed download: download it again"
    else:
        what = "an empty file" if not start else "something else (it does not begin with the letters GGUF)"
    raise ValueError(f"{path} is no GGUF file, but {what}.")


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
