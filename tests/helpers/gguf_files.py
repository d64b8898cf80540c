"""Small GGUF files, written by the official package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 2, 64, 96, 4, 2, 50


def random_tensors(*, tied: bool = False) -> dict[str, np.ndarray]:
    """Tensors of a small random llama in float32, named and shaped as in a file."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH)} | ({} if tied else {"output": (VOCABULARY, WIDTH)})
    for block in range(BLOCKS):
        key_rows = WIDTH * KV_HEADS // HEADS
        shapes |= {f"blk.{block}.attn_{kind}": (rows, WIDTH) for kind, rows in zip("qkv", (WIDTH, key_rows, key_rows), strict=True)}
        shapes |= {f"blk.{block}.attn_output": (WIDTH, WIDTH), f"blk.{block}.ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{block}.ffn_gate": (HIDDEN, WIDTH), f"blk.{block}.ffn_up": (HIDDEN, WIDTH)}
    tensors = {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    norms = ["output_norm", *(f"blk.{block}.{kind}_norm" for block in range(BLOCKS) for kind in ("attn", "ffn"))]
    return tensors | {f"{name}.weight": np.ones(WIDTH, dtype=np.float32) for name in norms}


def write_model(
    path: Path, tensors: Mapping[str, np.ndarray] | None = None, *, kind: str = "F32", architecture: str = "llama", **writer: Any
) -> Path:
    """Writes a model: matrices quantized to ``kind``, the rest in float32. ``writer``: options of `gguf.GGUFWriter`."""
    import gguf

    file = gguf.GGUFWriter(path, architecture, **writer)
    file.add_name("small")
    file.add_context_length(128)
    file.add_embedding_length(WIDTH)
    file.add_block_count(BLOCKS)
    file.add_feed_forward_length(HIDDEN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV_HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_token_list([f"<{number}>" for number in range(VOCABULARY)])
    file.add_token_scores([float(number) for number in range(VOCABULARY)])
    quantization = gguf.GGMLQuantizationType[kind]
    for name, tensor in (random_tensors() if tensors is None else tensors).items():
        if tensor.ndim == 2 and kind != "F32":
            file.add_tensor(name, gguf.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            file.add_tensor(name, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def write_vocabulary(
    path: Path,
    tokens: Sequence[str],
    kinds: Sequence[int] | None,
    *,
    model: str = "gpt2",
    pre: str | None = None,
    merges: Sequence[tuple[str, str]] = (),
    scores: Sequence[float] = (),
    **metadata: Any,
) -> Path:
    """Writes a file with a vocabulary and an embedding alone, for llama.cpp's `vocab_only`. ``metadata``: ``__`` stands for a dot."""
    import gguf

    file = gguf.GGUFWriter(path, "llama")
    file.add_name(metadata.pop("name", "small"))
    file.add_context_length(128)
    file.add_embedding_length(2)
    file.add_block_count(1)
    file.add_feed_forward_length(2)
    file.add_head_count(1)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_tokenizer_model(model)
    if pre is not None:
        file.add_tokenizer_pre(pre)
    file.add_token_list(list(tokens))
    if kinds is not None:
        file.add_token_types(list(kinds))
    if merges:
        file.add_token_merges([" ".join(pair) for pair in merges])
    if scores:
        file.add_token_scores(list(scores))
    for name, value in metadata.items():
        key = f"tokenizer.{name.replace('__', '.')}"
        if isinstance(value, bool):
            file.add_bool(key, value)
        elif isinstance(value, int):
            file.add_uint32(key, value)
        elif isinstance(value, str):
            file.add_string(key, value)
        else:
            file.add_array(key, value)
    file.add_tensor("token_embd.weight", np.zeros((len(tokens), 2), dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def write_tokenizer(path: Path, tokenizer: Any, **options: Any) -> Path:
    """Writes the vocabulary of a Hugging Face BPE tokenizer, byte-level or SentencePiece's, as llama.cpp's converter does.

    ``options``: of `write_vocabulary`, before what the tokenizer says.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    kinds = [1] * len(tokens)
    for added in data["added_tokens"]:
        kinds[added["id"]] = 3 if added["special"] else 4
    pieces = data["model"]
    if pieces["byte_fallback"]:
        for byte in range(256):
            kinds[pieces["vocab"][f"<0x{byte:02X}>"]] = 6
        kinds[tokenizer.unk_token_id] = 2
        ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(pieces["merges"])))}
        scores = [float(-ranks.get(token, len(ranks) + number)) for number, token in enumerate(tokens)]
        how = {"merges": pieces["merges"]} if options.get("model") == "gemma4" else {"scores": scores}
        options = {"model": "llama", **how} | options
    else:
        options = {"pre": "gpt-2", "merges": [tuple(pair) for pair in pieces["merges"]]} | options
    for key, number in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if number is not None:
            options.setdefault(f"ggml__{key}_token_id", number)
    if tokenizer.chat_template is not None:
        options.setdefault("chat_template", tokenizer.chat_template)
    return write_vocabulary(path, tokens, kinds, **options)


class VocabularyOnly:
    """llama.cpp with the vocabulary of a file and no model."""

    def __init__(self, path: Path) -> None:
        from zotune.engines.gguf.file import GGUFFile
        from zotune.engines.llama_cpp.library import load

        self.lib, self.file = load(), GGUFFile(path)
        parameters = self.lib.llama_model_default_params()
        parameters.vocab_only = True
        self._model = self.lib.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, f"llama.cpp does not load {path}"
        self.vocab = self.lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(self.vocab))

    def close(self) -> None:
        self.lib.llama_model_free(self._model)
