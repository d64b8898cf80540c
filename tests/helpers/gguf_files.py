"""Small GGUF files, written by the official package."""

from __future__ import annotations

from collections.abc import Mapping
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
