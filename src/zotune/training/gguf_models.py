"""Models in GGUF files, computed by llama.cpp: their plan, their tokenizer, and what a run saves of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from zotune.engines.gguf.file import GGUFFile
from zotune.engines.llama_cpp.llama import LlamaCpp, LlamaOptions
from zotune.engines.model import EngineModel
from zotune.io.atomic import write_text
from zotune.io.json_files import write_json
from zotune.io.text import read_text
from zotune.training.arguments import ModelArguments
from zotune.training.base_identity import BaseIdentity
from zotune.training.checkpoint.files import GGUF_ADAPTER, GGUF_SOURCE, MODELFILE
from zotune.training.checkpoint.identity import dtypes_of

PEFT = "peft"
#: Bytes of a source file, at most.
LONGEST = 1 << 20


class GGUFConfig(PretrainedConfig):
    """What the rest of the code reads of a model's configuration."""

    model_type = "gguf"


def config_of(file: GGUFFile, n_ctx: int = 0) -> GGUFConfig:
    """The configuration of a model in a GGUF file.

    Raises:
        ValueError: ``n_ctx`` is more than the model was trained with.
    """
    if n_ctx > file.context_length:
        raise ValueError(f"--n_ctx {n_ctx} is more than the {file.context_length} tokens that {file.path} was trained with: take fewer.")
    heads = {} if file.key_heads is None else dict(zip(("num_key_value_heads", "head_dim"), file.key_heads, strict=True))
    return GGUFConfig(
        architectures=[f"{file.architecture} (GGUF)"],
        vocab_size=file.vocabulary_size,
        hidden_size=file.width,
        num_hidden_layers=file.num_blocks,
        max_position_embeddings=n_ctx or file.context_length,
        **heads,
    )


def check_options(args: ModelArguments) -> None:
    """ValueError for an option of torch models, or a value that llama.cpp does not take."""
    options_of(args)
    for name in ("attn_implementation", "trust_remote_code", "quantize"):
        if getattr(args, name):
            raise ValueError(f"--{name} is an option of torch models, and llama.cpp computes a GGUF file: leave it out.")
    if args.dtype not in ("auto", "float32"):
        raise ValueError("a GGUF file has its own precision, and updates are float32: leave --dtype out.")
    if args.offload != "no":
        raise ValueError("a GGUF file is memory-mapped, so it need not fit into memory: leave --offload out.")


def load_engine(file: GGUFFile, config: GGUFConfig, args: ModelArguments) -> EngineModel:
    """The model, ready to be evaluated.

    Raises:
        ValueError: llama.cpp is not installed, or does not load the file.
    """
    return EngineModel(LlamaCpp(file, options_of(args)), config)


def options_of(args: ModelArguments) -> LlamaOptions:
    """The options of llama.cpp; ValueError for one out of range."""
    try:
        return LlamaOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LlamaOptions)})
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def identity_of(model: EngineModel) -> BaseIdentity:
    """The identity of the file that a model is from."""
    return BaseIdentity(dtypes_of(model), model.engine.digest(), [])


def file_of(model: EngineModel) -> GGUFFile:
    """The file that a model is from."""
    assert isinstance(model.engine, LlamaCpp), "a GGUF file is computed by llama.cpp"
    return model.engine.file


def quantization(model: EngineModel) -> str:
    """How the file stores most weights, such as ``Q4_K_M``."""
    return file_of(model).quantization


def elements(model: EngineModel) -> int:
    """Numbers of all weights in the file."""
    return sum(math.prod(tensor.shape) for tensor in file_of(model).tensors.values())


# -- what a run saves -----------------------------------------------------------------------------------------------------------------


def save(folder: Path, model: EngineModel, facts: Mapping[str, Any], *, checkpoint_too: bool, chat: bool) -> None:
    """Write the adapter: for llama.cpp and Ollama, with a Modelfile, and for the original checkpoint as a PEFT folder where it is known.

    Args:
        folder: where to; it exists.
        model: with the trained factors.
        facts: of the run, for the adapter's metadata.
        checkpoint_too: whether to write the PEFT folder.
        chat: whether the model was trained on chats, so that Ollama takes its chat template.
    """
    from zotune.engines.gguf.adapter import peft_folder, write_adapter
    from zotune.engines.gguf.modelfile import modelfile

    file = file_of(model)
    factors, base = model.factors(), model.engine.digest()
    metadata = {key: str(value) for key, value in {"base": base, **facts}.items()}
    write_adapter(folder / GGUF_ADAPTER, file, factors, metadata)
    write_text(folder / MODELFILE, modelfile(file, chat=chat))
    write_json(folder / GGUF_SOURCE, {"base": str(file.path), "digest": base})
    if checkpoint_too and all(name.startswith("model.") for name in factors):  # else it is not known what the checkpoint calls them
        peft_folder(folder / PEFT, file, factors)


def source_of(folder: Path) -> tuple[Path, Path] | None:
    """(GGUF file, adapter) of a folder that a run saved; None for another folder.

    Raises:
        ValueError: the folder's files are damaged, or the GGUF file is gone.
    """
    path = folder / GGUF_SOURCE
    if not path.is_file():
        return None
    try:
        base = json.loads(read_text(path, LONGEST))["base"]
    except (ValueError, LookupError, TypeError, RecursionError):
        base = None
    if not isinstance(base, str):
        raise ValueError(f"{path} is damaged: it names no GGUF file; give the file, and {folder / GGUF_ADAPTER} as --adapter.")
    if not Path(base).is_file():
        raise ValueError(f"{base}, the model of {folder}, is gone: give the GGUF file, and {folder / GGUF_ADAPTER} as --adapter.")
    return Path(base), folder / GGUF_ADAPTER


def add_adapter(model: EngineModel, adapter: Path) -> None:
    """Have the model compute with an adapter of its own base.

    Raises:
        ValueError: no adapter, or one of another base.
    """
    import torch

    from zotune.engines.gguf.adapter import read_adapter

    factors, metadata = read_adapter(adapter, file_of(model))
    base, here = metadata.get("base"), model.engine.digest()
    if base is not None and base != here:
        raise ValueError(
            f"{adapter} was trained on another base (digest {base[:12]}…, this one {here[:12]}…): give the GGUF file of that run."
        )
    for name, (left, right) in factors.items():
        model.matrices[name].add(torch.from_numpy(left), torch.from_numpy(right), 1.0)
