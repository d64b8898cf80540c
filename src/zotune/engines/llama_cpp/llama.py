"""llama.cpp as an engine: a GGUF file, memory-mapped and only read, with low-rank factors as adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zotune.engines.engine import Factors, Row, Watch
from zotune.engines.gguf.file import GGUFFile, Matrix
from zotune.engines.llama_cpp.adapters import AdapterSlot
from zotune.engines.llama_cpp.context import Context
from zotune.engines.llama_cpp.library import last_words, load

#: Elements of the head's weight that are dequantized at a time.
STRIP = 1 << 22
#: Types of keys and values by name.
CACHE_TYPES = ("f32", "f16")


@dataclass(frozen=True)
class LlamaOptions:
    """Options of llama.cpp, as it calls them.

    Attributes:
        n_threads: of the evaluation; results do not depend on it, time does. 0: as many as torch has.
        n_gpu_layers: blocks that are offloaded to a GPU, if llama.cpp was compiled for one; -1 for all.
        n_ctx: most tokens of a text; 0: as many as the model was trained with.
        n_ubatch: most tokens that are evaluated at a time.
        cache_type: of keys and values, ``"f32"`` or ``"f16"``. Half precision adds noise to loss differences.

    Raises:
        ValueError: a number is out of range, or another type.
    """

    n_threads: int = 0
    n_gpu_layers: int = 0
    n_ctx: int = 0
    n_ubatch: int = 1024
    cache_type: str = "f32"

    def __post_init__(self) -> None:
        for name, least in (("n_threads", 0), ("n_gpu_layers", -1), ("n_ctx", 0), ("n_ubatch", 32)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)!r}.")
        if self.cache_type not in CACHE_TYPES:
            raise ValueError(f"cache_type must be {' or '.join(CACHE_TYPES)}, not {self.cache_type!r}.")


class LlamaCpp:
    """The engine (:class:`zotune.engines.engine.Engine`).

    Args:
        file: the model.
        options: of llama.cpp.

    Raises:
        ValueError: llama.cpp is not installed, or does not load the file.
    """

    name = "llama.cpp"

    def __init__(self, file: GGUFFile, options: LlamaOptions | None = None) -> None:
        self.options = options or LlamaOptions()
        self.file, self.lib = file, load()
        self._matrices: dict[str, Matrix] = {matrix.name: matrix for matrix in file.matrices}
        self.matrices = {name: matrix.shape for name, matrix in self._matrices.items()}
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers = self.options.n_gpu_layers
        self._model = self.lib.llama_model_load_from_file(str(file.path).encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {file.path}: {last_words() or 'it gives no reason'}.")
        self.vocab = self.lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(self.vocab))
        self.width = int(self.lib.llama_model_n_embd(self._model))
        self.context = self.options.n_ctx or int(self.lib.llama_model_n_ctx_train(self._model))
        names = {matrix.tensor.encode(): name for name, matrix in self._matrices.items()}
        self._context = Context(
            self.lib,
            self._model,
            self.vocabulary,
            self.context,
            n_threads=self.options.n_threads or torch.get_num_threads(),
            n_ubatch=self.options.n_ubatch,
            cache_type=getattr(self.lib, f"GGML_TYPE_{self.options.cache_type.upper()}"),
            weights=names | {file.head.encode(): ""},
        )
        self._slots: dict[str, AdapterSlot] = {}
        self._digest: str | None = None

    # -- factors ----------------------------------------------------------------------------------------------------------------------

    def set_factors(self, folded: Factors, current: Factors) -> None:
        attached = [slot.pointer for slot in self._slots.values()]
        self._context.set_adapters(())  # before one of them is freed
        try:
            self._set("folded", folded)
            self._set("current", current)
        finally:
            now = [slot.pointer for slot in self._slots.values() if slot.pointer is not None]
            self._context.set_adapters(now)
        del attached

    def _set(self, kind: str, factors: Factors) -> None:
        rank = max((left.shape[1] for left, _ in factors.values()), default=0)
        slot = self._slots.get(kind)
        if slot is not None and slot.rank != rank:
            self._slots.pop(kind).close()
            slot = None
        if not rank:
            return
        if slot is None:
            slot = AdapterSlot(self.lib, self._model, self.file.architecture, self._matrices, rank)
            self._slots[kind] = slot
        slot.load({name: (_padded(left, rank), _padded(right, rank)) for name, (left, right) in factors.items()})

    # -- evaluation -------------------------------------------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row], watch: Watch | None = None) -> np.ndarray:
        return self._context.decode(rows, watch)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int]) -> list[list[int]]:
        from zotune.engines.llama_cpp.generation import greedy

        return greedy(self._context, prompts, max_new_tokens, stops)

    # -- the head ---------------------------------------------------------------------------------------------------------------------

    def head_rows(self, ids: Tensor) -> Tensor:
        rows = torch.from_numpy(self.file.rows(self.file.head, ids.flatten().numpy()))
        return rows.view(*ids.shape, self.width)

    def head_product(self, weights: Tensor) -> Tensor:
        found = torch.zeros(len(weights), self.width)
        step = max(1, STRIP // self.width)
        for first in range(0, self.vocabulary, step):
            ids = torch.arange(first, min(first + step, self.vocabulary))
            found.addmm_(weights[:, ids[0] : ids[-1] + 1].float(), self.head_rows(ids))
        return found

    # -- the rest ---------------------------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        if self._digest is None:  # the file does not change, and reading it takes long
            self._digest = self.file.digest()
        return self._digest

    def close(self) -> None:
        self._context.set_adapters(())
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
        self._context.free()
        if self._model:
            self.lib.llama_model_free(self._model)
            self._model = None


def _padded(factor: Tensor, rank: int) -> Tensor:
    """A factor of so many columns, the further ones zeros."""
    factor = factor.detach().float()
    return factor if factor.shape[1] == rank else torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))
