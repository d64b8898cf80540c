"""A checkpoint of transformers as a GGUF file: :func:`convert`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from zotune.engines.gguf.checkpoint import Checkpoint
from zotune.engines.gguf.outtypes import BY_ENGINE, DIRECT, OUTTYPES
from zotune.engines.gguf.vocabulary import read_vocabulary
from zotune.io.atomic import whole_file
from zotune.io.suggest import did_you_mean_or

_TYPES = gguf.GGMLQuantizationType


def convert(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], outtype: str = "f16", *, overwrite: bool = False) -> Path:
    """Writes a Llama-, Mistral-, Qwen2- or Qwen3-like checkpoint of transformers, weights and tokenizer, as one GGUF file.

    Vectors stay in float32. A matrix whose rows are no multiple of the type's block is stored as llama.cpp would: in float16. With q4_0 the
    head is stored as q8_0. The result is the same, byte for byte, every time.

    Args:
        checkpoint: a folder with config.json, safetensors files and tokenizer.
        out: the file; its folder is made.
        outtype: one of :mod:`zotune.engines.gguf.outtypes`; those that llama.cpp writes need llama-cpp-python.
        overwrite: replace a file that is there.

    Raises:
        ValueError: the checkpoint cannot be converted here, or ``out`` is there already.
    """
    folder, out, outtype = Path(checkpoint).expanduser(), Path(out).expanduser(), outtype.lower()
    if outtype not in OUTTYPES:
        raise ValueError(f"unknown type {outtype!r} of weights{did_you_mean_or(outtype, OUTTYPES, 'there are')}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the file in it, such as {out / (folder.name + '.gguf')}.")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already: name another file, or overwrite it with --overwrite.")
    if outtype in BY_ENGINE:
        import llama_cpp  # noqa: F401 - that it is missing is said before the work
    with Checkpoint(folder) as source:
        vocabulary = read_vocabulary(folder, source.config.vocab_size)
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as partial:
            if outtype in DIRECT:
                _write(source, vocabulary, partial, outtype)
            else:
                whole = out.with_name(f".{out.name}.whole")
                try:
                    _write(source, vocabulary, whole, source.dtype)
                    _quantize_by_engine(whole, partial, outtype)
                finally:
                    whole.unlink(missing_ok=True)
    return out


def _write(source: Checkpoint, vocabulary: Any, path: Path, outtype: str) -> None:
    writer = gguf.GGUFWriter(path, source.architecture)
    try:
        _add_metadata(writer, source, outtype)
        vocabulary.write(writer)
        factors = source.rope_factors()
        plan = [(name, *where, _type_of(*where, source, outtype)) for name, where in source.layout.items()]
        if factors is not None:
            plan.insert(0, ("", "rope_freqs.weight", factors.shape, _TYPES.F32))
        for _, there, shape, kind in plan:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(there, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, there, _, kind in plan:
            writer.write_tensor_data(_stored(source.folder, there, source.read(name) if name else factors, kind))
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, source: Checkpoint, outtype: str) -> None:
    config, rope = source.config, source.config.rope_parameters
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.folder.resolve().name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(source.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(source.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _type_of(there: str, shape: tuple[int, ...], source: Checkpoint, outtype: str) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return _TYPES.F32
    head = "token_embd.weight" if source.config.tie_word_embeddings else "output.weight"
    kind = _TYPES.Q8_0 if outtype == "q4_0" and there == head else _TYPES[outtype.upper()]
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else _TYPES.F16


def _stored(folder: Path, name: str, tensor: Any, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} of {folder} holds numbers that are not finite: the checkpoint is damaged; download it again.")
    if kind == _TYPES.F16 and np.abs(tensor).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} of {folder} holds numbers beyond float16's: convert with --outtype bf16 or f32.")
    return tensor if kind == _TYPES.F32 else gguf.quantize(tensor, kind)


def _quantize_by_engine(source: Path, out: Path, outtype: str) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = int(gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"])
    with _quiet_engine():
        failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), options)
    if failed:
        raise ValueError(f"llama.cpp could not quantize to {outtype}: try another --outtype, such as q8_0.")


@contextmanager
def _quiet_engine() -> Iterator[None]:
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
