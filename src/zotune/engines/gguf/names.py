"""What the matrices of a GGUF file are called in the checkpoint that it was made from, and how their rows are stored."""

from __future__ import annotations

import re

import numpy as np

#: Architectures whose attention and feed-forward matrices have these names in their checkpoints.
KNOWN = frozenset({"llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2"})
#: Those whose q and k are stored in llama.cpp's own order of rows.
PERMUTED = frozenset({"llama"})
LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SHARED_EXPERT = {f"{name}_shexp": layer.replace("mlp.", "mlp.shared_expert.") for name, layer in LAYERS.items() if name.startswith("ffn")}
_TRAINABLE = re.compile(
    r"blk\.(\d{1,6})\.(attn_q|attn_k|attn_v|attn_qkv|attn_output|ffn_gate|ffn_up|ffn_down|ffn_gate_shexp|ffn_up_shexp|ffn_down_shexp)\.weight"
)


def trainable(tensor: str) -> tuple[int, str] | None:
    """The block and kind (``attn_q``) of a tensor that can be trained if it is a matrix; None for another."""
    match = _TRAINABLE.fullmatch(tensor)
    return (int(match[1]), match[2]) if match else None


def checkpoint_name(architecture: str, tensor: str) -> str:
    """The name of a matrix's layer in the original checkpoint, or the tensor's own without ``.weight`` where that is not known.

    Example:
        >>> checkpoint_name("llama", "blk.3.attn_q.weight"), checkpoint_name("mamba", "blk.3.ssm_in.weight")
        ('model.layers.3.self_attn.q_proj', 'blk.3.ssm_in')
    """
    found = trainable(tensor)
    if found and architecture in KNOWN:
        layer = LAYERS.get(found[1]) or (_SHARED_EXPERT.get(found[1]) if architecture == "qwen2moe" else None)
        if layer:
            return f"model.layers.{found[0]}.{layer}"
    return tensor.removesuffix(".weight")


def to_file_rows(left: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows in the checkpoint's order -> the file's: of each head, the first and second half of its rows alternate.

    The checkpoint rotates rows i and i + d/2 of a head of d rows together, llama.cpp rows 2i and 2i + 1.

    Args:
        left: rows first, (m, ...).
        heads: that the m rows are of; None: the orders are the same.
    """
    if heads is None:
        return left
    return left.reshape(heads, 2, len(left) // heads // 2, *left.shape[1:]).swapaxes(1, 2).reshape(left.shape)


def from_file_rows(left: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows in the file's order -> the checkpoint's: the inverse of :func:`to_file_rows`."""
    if heads is None:
        return left
    return left.reshape(heads, len(left) // heads // 2, 2, *left.shape[1:]).swapaxes(1, 2).reshape(left.shape)
