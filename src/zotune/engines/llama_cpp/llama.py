"""llama.cpp as an engine: a GGUF file, memory-mapped and only read, with low-rank factors as adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zotune.engines.engine import Choose, Factors, Row, Watch
from zotune.engines.gguf.file import GGUFFile, Matrix
from zotune.engines.llama_cpp.adapters import Adapter, padded
from zotune.engines.llama_cpp.context import MAX_SEQUENCES, Context
from zotune.engines.llama_cpp.generation import completions, likeliest
from zotune.engines.llama_cpp.library import forget, last_words, load, raising
from zotune.io.cores import available_cores

#: Elements of the head's weight that are dequantized at a time.
STRIP = 1 << 22
#: Types of keys and values by name.
CACHE_TYPES = ("f32", "f16")
#: Threads that llama.cpp takes at most.
MAX_THREADS = 512


@dataclass(frozen=True)
class LlamaOptions:
    """Options of llama.cpp, as it calls them.

    Attributes:
        n_threads: of the evaluation, at most one a core; results do not depend on it, time does. 0: as many as torch has.
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
        if self.n_threads > MAX_THREADS:  # llama.cpp would end the process
            raise ValueError(f"n_threads must be at most {MAX_THREADS}, not {self.n_threads!r}.")
        if self.cache_type not in CACHE_TYPES:
            raise ValueError(f"cache_type must be {' or '.join(CACHE_TYPES)}, not {self.cache_type!r}.")


def _threads(wanted: int) -> int:
    """Threads of the evaluation: no more than cores, since they wait actively."""
    cores = available_cores()
    if wanted > cores:
        warnings.warn(
            f"n_threads={wanted} is more than the {cores} {'core' if cores == 1 else 'cores'} that this process may use, where llama.cpp "
            f"becomes many times slower: {cores} {'is' if cores == 1 else 'are'} used.",
            stacklevel=3,
        )
    return min(wanted or torch.get_num_threads(), cores)


class LlamaCpp:
    """The engine (:class:`zotune.engines.engine.Engine`).

    Args:
        file: the model.
        options: of llama.cpp.

    Raises:
        ValueError: llama.cpp is not installed, or does not load the file.
    """

    name = "llama.cpp"
    continuations = MAX_SEQUENCES

    def __init__(self, file: GGUFFile, options: LlamaOptions | None = None) -> None:
        self.options = options or LlamaOptions()
        self.file, self.lib = file, load()
        self._matrices: dict[str, Matrix] = {matrix.name: matrix for matrix in file.matrices}
        self.matrices: Mapping[str, tuple[int, int]] = {name: matrix.shape for name, matrix in self._matrices.items()}
        if self.options.n_gpu_layers and not self.lib.llama_supports_gpu_offload():
            raise ValueError("n_gpu_layers needs a llama.cpp that was compiled for a GPU, and this one was not: leave it out.")
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers = self.options.n_gpu_layers
        forget()
        with raising():
            self._model = self.lib.llama_model_load_from_file(str(file.path).encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {file.path}: {last_words() or 'it gives no reason'}.")
        self.vocab = self.lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(self.vocab))
        self.width = int(self.lib.llama_model_n_embd(self._model))
        types = {file.tensors[matrix.tensor].type.name for matrix in file.matrices} | {file.tensors[file.head].type.name}
        self.exact = types == {"F32"} and self.options.cache_type == "f32" and not self.options.n_gpu_layers
        self.context = self.options.n_ctx or int(self.lib.llama_model_n_ctx_train(self._model))
        names = {matrix.tensor.encode(): name for name, matrix in self._matrices.items()}
        self._context = Context(
            self.lib,
            self._model,
            self.vocabulary,
            self.context,
            n_threads=_threads(self.options.n_threads),
            n_ubatch=self.options.n_ubatch,
            cache_type=getattr(self.lib, f"GGML_TYPE_{self.options.cache_type.upper()}"),
            weights=names | {file.head.encode(): ""},
        )
        self._adapter: Adapter | None = None
        self._digest: str | None = None

    # -- factors ----------------------------------------------------------------------------------------------------------------------

    def set_factors(self, folded: Factors, current: Factors) -> None:
        ranks = {}
        for name in self.matrices:
            columns = sum(factors[name][0].shape[1] for factors in (folded, current) if name in factors)
            if columns:
                ranks[name] = columns
        if self._adapter is not None and self._adapter.ranks != padded(ranks):
            self._drop_adapter()
        if not ranks or not self._model:  # closed: the evaluation will say so
            return
        if self._adapter is None:
            tensors = self._context.tensors
            self._adapter = Adapter(self.lib, self._model, self.file.architecture, self._matrices, ranks, tensors)
        elif self._adapter.unseen:
            self._context.set_adapter(None)  # it is loaded anew
        self._adapter.set(folded, current)
        self._context.set_adapter(self._adapter)

    def _drop_adapter(self) -> None:
        self._context.set_adapter(None)  # before it is freed
        adapter, self._adapter = self._adapter, None  # before an interrupt can leave it half closed
        if adapter is not None:
            adapter.close()

    # -- evaluation -------------------------------------------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row], watch: Watch | None = None) -> np.ndarray:
        return self._context.decode(rows, watch)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        choose: Choose | None = None,
        num_samples: int = 1,
    ) -> list[list[int]]:
        return completions(self._context, prompts, max_new_tokens, stops, choose or likeliest, num_samples)

    # -- the head ---------------------------------------------------------------------------------------------------------------------

    def final_norm(self) -> tuple[Tensor, Tensor | None] | None:
        weight, bias = (self.file.vector(f"output_norm.{part}") for part in ("weight", "bias"))
        if weight is None or len(weight) != self.width:
            return None
        return torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias)

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
        self._drop_adapter()
        self._context.close()
        model, self._model = self._model, None
        if model:
            with raising():
                self.lib.llama_model_free(model)
