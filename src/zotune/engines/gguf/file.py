"""A model as a GGUF file, memory-mapped: :class:`GGUFFile`."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from zotune.engines.gguf.header import Header, Tensor, dequantized
from zotune.engines.gguf.names import PERMUTED, checkpoint_name, from_file_rows, to_file_rows, trainable

__all__ = ["GGUFFile", "Matrix", "from_file_rows", "to_file_rows"]

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Matrix:
    """A matrix of a GGUF file that can be trained.

    Args:
        name: of the layer in the original checkpoint where the architecture is known (``model.layers.0.self_attn.q_proj``), else the
            tensor's own without ``.weight``.
        tensor: the tensor's name in the file.
        shape: (outputs m, inputs n), torch's order.
        heads: that its rows are stored permuted over (:func:`to_file_rows`); None: in the checkpoint's order.
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    heads: int | None


class GGUFFile:
    """A language model in a GGUF file or in all parts of a split one. Opening it reads the header alone.

    Args:
        path: the file, or any part of a split file.

    Raises:
        ValueError: no GGUF file, truncated or damaged, a part is missing, or it holds no language model. The message says what to do.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Header(Path(path))
        headers = _parts(given)
        self.path = headers[0].path
        self.paths = [header.path for header in headers]
        self.metadata = headers[0].metadata
        self.tensors: dict[str, Tensor] = {}
        for header in headers:
            for name, tensor in header.tensors.items():
                if name in self.tensors:
                    raise ValueError(f"{header.path} is damaged: it holds the tensor {name!r} of a part before it; download it again.")
                self.tensors[name] = tensor
        self._check_is_language_model()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """The same as ``GGUFFile(path)``."""
        return cls(path)

    def _check_is_language_model(self) -> None:
        kind = self.metadata.get("general.type", "model")
        if kind == "adapter":
            raise ValueError(f"{self.path} is an adapter, no model: give the GGUF of the model that it belongs to.")
        if kind != "model" or "token_embd.weight" not in self.tensors:
            raise ValueError(f"{self.path} holds no language model (type {kind!r}, {len(self.tensors)} tensors): give the GGUF of one.")
        if len(self.tensors["token_embd.weight"].shape) != 2 or len(self.tensors[self.head].shape) != 2:
            raise ValueError(f"{self.path} is damaged: its embedding or its head is no matrix; download it again.")
        for key in ("context_length", "embedding_length", "block_count"):
            self._number(key)

    def _number(self, key: str) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{self.path} is damaged: {self.architecture}.{key} is {str(value)[:40]!r}, no number; convert the model again."
            )
        return value

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it, such as ``llama`` or ``qwen2``."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str) or not value:
            raise ValueError(f"{self.path} is damaged: it does not say its architecture (general.architecture); convert the model again.")
        return value

    @property
    def name(self) -> str | None:
        """The model's name, if it has one."""
        value = self.metadata.get("general.name")
        return value if isinstance(value, str) else None

    @property
    def context_length(self) -> int:
        """Most tokens that the model was made for."""
        return self._number("context_length")

    @property
    def width(self) -> int:
        """The hidden size."""
        return self._number("embedding_length")

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return self._number("block_count")

    @property
    def key_heads(self) -> tuple[int, int] | None:
        """Heads of the keys of a block, at most, and elements of one; None where the file does not say."""

        def most(key: str) -> int:
            value = self.metadata.get(f"{self.architecture}.attention.{key}")
            return max((n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)), default=0)

        heads = most("head_count")
        size = most("key_length") or (self.width // heads if heads > 0 else 0)
        found = most("head_count_kv") or heads
        return (found, size) if found > 0 and size > 0 else None

    @property
    def vocabulary_size(self) -> int:
        """Rows of the head: tokens that have a logit."""
        return self.tensors[self.head].shape[0]

    @property
    def head(self) -> str:
        """The tensor of the language-model head, which is the embedding's where they are tied."""
        return "output.weight" if "output.weight" in self.tensors else "token_embd.weight"

    @property
    def quantization(self) -> str:
        """How most weights are stored, such as ``Q4_K_M``: as the file says, else the most common type of its matrices."""
        try:
            return gguf.LlamaFileType(self.metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except (KeyError, ValueError):
            types = Counter(tensor.type for tensor in self.tensors.values() if len(tensor.shape) > 1)
            return types.most_common(1)[0][0].name

    @cached_property
    def matrices(self) -> list[Matrix]:
        """The matrices of attention and feed-forward that can be trained, by block and then by tensor's name."""
        found = []
        for name, tensor in self.tensors.items():
            place = trainable(name)
            if place is not None and len(tensor.shape) == 2:
                found.append(
                    (
                        *place,
                        Matrix(checkpoint_name(self.architecture, name), name, (tensor.shape[0], tensor.shape[1]), self._heads(*place)),
                    )
                )
        return [matrix for _, _, matrix in sorted(found, key=lambda each: each[:2])]

    def _heads(self, block: int, kind: str) -> int | None:
        if self.architecture not in PERMUTED or kind not in ("attn_q", "attn_k"):
            return None
        keys = ("attention.head_count_kv", "attention.head_count") if kind == "attn_k" else ("attention.head_count",)
        value: Any = next((self.metadata[key] for key in (f"{self.architecture}.{key}" for key in keys) if key in self.metadata), None)
        if isinstance(value, list):
            value = value[block] if block < len(value) else None
        rows = self.tensors[f"blk.{block}.{kind}.weight"].shape[0]
        if not isinstance(value, int) or value < 1 or rows % (2 * value):
            raise ValueError(f"{self.path} is damaged: blk.{block}.{kind} has {rows} rows and {value} heads; convert the model again.")
        return value

    def rows(self, tensor: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of a matrix in float32, (len(ids), n), without dequantizing the others.

        Raises:
            IndexError: there is no such row.
            ValueError: the installed gguf cannot dequantize the tensor's type.
        """
        found, index = self.tensors[tensor], np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(found.shape) != 2:
            raise ValueError(f"{tensor} of {self.path} has the shape {found.shape} and is no matrix.")
        if index.size and not 0 <= index.min() <= index.max() < found.shape[0]:
            raise IndexError(f"{tensor} of {self.path} has {found.shape[0]} rows, and rows {index.min()} to {index.max()} were asked for.")
        return dequantized(found, index)

    def vector(self, tensor: str) -> np.ndarray | None:
        """A vector in float32, (n,); None where the file has none of this name."""
        found = self.tensors.get(tensor)
        if found is None or len(found.shape) != 1:
            return None
        return np.array(gguf.dequantize(found.data, found.type), dtype=np.float32)

    def pieces(self) -> Iterator[tuple[str, memoryview]]:
        """(name|type|shape|, bytes as stored) of every tensor by name, for a digest that does not depend on how the file is split."""
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            yield f"{name}|{tensor.type.name}|{'x'.join(map(str, tensor.shape))}|", tensor.data.data

    def digest(self) -> str:
        """BLAKE2b over all tensors and the architecture's numbers: what determines the logits of token ids. It reads the whole file."""
        own = f"{self.architecture}."
        numbers = {key: self.metadata[key] for key in sorted(self.metadata) if key.startswith(own)}
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            parts = list(pool.map(_hash, self.pieces()))
        return hashlib.blake2b(b"".join([repr(numbers).encode(), *parts]), digest_size=16).hexdigest()


def _hash(named: tuple[str, memoryview]) -> bytes:
    name, data = named
    hashed = hashlib.blake2b(name.encode(), digest_size=16)
    hashed.update(data)
    return hashed.digest()


def _parts(given: Header) -> list[Header]:
    """The headers of all parts of a split file, in order; of a whole file its own."""
    count = given.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [given]
    match = _PART.fullmatch(given.path.name)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"{given.path} is a part of a split file of {count}: name its parts as they were, like model-00001-of-{count:05}.gguf."
        )
    paths = [given.path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{given.path} is a part of a split file, and {missing[0]}{others} is missing beside it: download it too.")
    headers = [Header(path) for path in paths]
    for number, header in enumerate(headers):
        if header.metadata.get("split.no") != number or header.metadata.get("split.count") != count:
            raise ValueError(f"{header.path} is not part {number + 1} of {count} of this model, as its name says: download it again.")
    total, found = headers[0].metadata.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        raise ValueError(f"{headers[0].path} says that its parts hold {total} tensors, and they hold {found}: download them again.")
    return headers
