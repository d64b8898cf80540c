"""A checkpoint of transformers as a GGUF file wants it: which architecture, which tensors of which shapes, which hyperparameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from zotune.engines.gguf.names import LAYERS, PERMUTED, to_file_rows
from zotune.io.inside import indexed_files
from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened

#: Class in transformers -> architecture in llama.cpp.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
ELSEWHERE = "llama.cpp's convert_hf_to_gguf.py may convert it"
_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_UNUSED = re.compile(r".*rotary_emb\.inv_freq")


class Checkpoint:
    """A folder with `config.json` and safetensors files, opened; use it in a ``with`` block.

    Raises:
        ValueError: it is none, or no Llama-, Mistral-, Qwen2- or Qwen3-like model that llama.cpp computes as transformers does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, _config(folder)
        name = str((getattr(self.config, "architectures", None) or ["no architecture"])[0])[:60]
        if name not in ARCHITECTURES:
            raise ValueError(
                f"{folder} is a {name}, and {', '.join(ARCHITECTURES)} are converted here{did_you_mean(name, ARCHITECTURES)}; {ELSEWHERE}."
            )
        self.architecture = ARCHITECTURES[name]
        _check_config(folder, self.config, self.architecture)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        try:
            for path in _weight_files(self.folder):
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                self._files.update(dict.fromkeys(file.keys(), file))
            self._check_tensors()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def head_dim(self) -> int:
        """Numbers of one attention head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def context_length(self) -> int:
        """Most tokens; no more than a sliding window, which llama.cpp does not apply to these architectures."""
        window = getattr(self.config, "sliding_window", None) if self.architecture == "llama" else None
        return min(self.config.max_position_embeddings, window or math.inf)  # type: ignore[return-value]

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in the checkpoint -> name in the file and shape, of every tensor that is written."""
        config, arch = self.config, self.architecture
        width, hidden = config.hidden_size, config.intermediate_size
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        shapes = {
            "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width), "attn_output": (width, queries),
            "ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden),
        }  # fmt: skip
        biased: set[str] = {"attn_q", "attn_k", "attn_v"} if arch == "qwen2" else set()
        if arch == "llama":
            biased |= {kind for kind in shapes if kind.startswith("attn")} if getattr(config, "attention_bias", False) else set()
            biased |= {kind for kind in shapes if kind.startswith("ffn")} if getattr(config, "mlp_bias", False) else set()
        norms = {"input_layernorm": ("attn_norm", width), "post_attention_layernorm": ("ffn_norm", width)}
        if arch == "qwen3":
            norms |= {"self_attn.q_norm": ("attn_q_norm", self.head_dim), "self_attn.k_norm": ("attn_k_norm", self.head_dim)}
        table: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("token_embd.weight", (config.vocab_size, width))}
        for block in range(config.num_hidden_layers):
            here, there = f"model.layers.{block}", f"blk.{block}"
            table |= {f"{here}.{name}.weight": (f"{there}.{kind}.weight", (size,)) for name, (kind, size) in norms.items()}
            table |= {f"{here}.{LAYERS[kind]}.weight": (f"{there}.{kind}.weight", shape) for kind, shape in shapes.items()}
            table |= {f"{here}.{LAYERS[kind]}.bias": (f"{there}.{kind}.bias", shapes[kind][:1]) for kind in shapes if kind in biased}
        table["model.norm.weight"] = ("output_norm.weight", (width,))
        if not config.tie_word_embeddings:
            table["lm_head.weight"] = ("output.weight", (config.vocab_size, width))
        return table

    @property
    def dtype(self) -> str:
        """The type that holds every weight as it is: f32, f16 or bf16."""
        types = {_DTYPES[self._files[name].get_slice(name).get_dtype()] for name in self.layout}
        return types.pop() if len(types) == 1 else "f32"

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, its rows in the file's order."""
        tensor = self._files[name].get_tensor(name).to(torch.float32).numpy()
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}.get(name.split(".")[-2])
        return np.ascontiguousarray(to_file_rows(tensor, heads)) if heads and self.architecture in PERMUTED else tensor

    def rope_factors(self) -> np.ndarray | None:
        """What each frequency is divided by, float32 (head_dim / 2,), of Llama 3's scaling; None for another."""
        rope = self.config.rope_parameters
        if rope.get("rope_type") != "llama3":
            return None
        low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        frequency = 1 / rope["rope_theta"] ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        turns = context * frequency / (2 * math.pi)  # in the original context
        kept = np.clip((turns - low) / (high - low), 0, 1)  # share of the frequency that is not scaled
        return (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)

    def _check_tensors(self) -> None:
        if self.config.num_hidden_layers > len(self._files):  # before a table of that length is made
            raise ValueError(
                f"{self.folder} has {self.config.num_hidden_layers} layers by its config.json, and {len(self._files)} tensors."
            )
        layout = self.layout
        missing = [name for name in layout if name not in self._files]
        if missing:
            raise ValueError(
                f"{self.folder} lacks the tensor {missing[0]} ({len(missing)} in all): the checkpoint is not whole; download it again."
            )
        extra = [name for name in self._files if name not in layout and not _UNUSED.fullmatch(name) and name != "lm_head.weight"]
        if extra:
            raise ValueError(f"{self.folder} holds the tensor {extra[0]}, which a {self.architecture} of llama.cpp has not; {ELSEWHERE}.")
        for name, (_, shape) in layout.items():
            view = self._files[name].get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise ValueError(f"{self.folder} stores {name} as {view.get_dtype()}: give the checkpoint in float32, bfloat16 or float16.")
            if tuple(view.get_shape()) != shape:
                raise ValueError(
                    f"{self.folder}: {name} has the shape {tuple(view.get_shape())}, and config.json says {shape}; download it again."
                )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not folder.is_dir():
        hint = "download it first, with `hf download`, and give its folder" if not folder.exists() else "give a checkpoint's folder"
        raise ValueError(f"{folder} is no folder: {hint}.")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is a PEFT adapter, no model: merge it into its base model and convert that.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint of transformers: it has no config.json.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of a value that transformers does not take, of several kinds
        raise ValueError(f"{folder / 'config.json'} cannot be read ({shortened(str(error), 200)}): download it again.") from error


def _check_config(folder: Path, config: Any, architecture: str) -> None:
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder} is quantized already: give the checkpoint in float32, bfloat16 or float16, and quantize with --outtype."
        )
    refused = {
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
        f"{rope.get('rope_type')!r} scaling of its rotary positions": rope.get("rope_type") not in ("default", "linear", "llama3"),
        "rotary positions of a part of each head": (rope.get("partial_rotary_factor") or 1) != 1,
        "sliding windows": architecture != "llama" and "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "biases of attention": architecture == "qwen3" and getattr(config, "attention_bias", False),
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"{folder} has {what}, which is not converted here; {ELSEWHERE}.")


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = indexed_files(index) if index.is_file() else [single]
    missing = [file.name for file in files if not file.is_file()]
    if missing and not index.is_file():
        pickled = any(folder.glob("*.bin"))
        hint = "it holds its weights as a pickle; save it with `save_pretrained` once" if pickled else "download it whole"
        raise ValueError(f"{folder} has no model.safetensors: {hint}.")
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, a file of its weights: download it too.")
    return files
