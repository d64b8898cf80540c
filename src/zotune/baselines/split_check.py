"""Whether a model can be split: backprop through its last blocks, forward passes alone before them."""

from __future__ import annotations

from torch import nn

from zotune.weights.structure import blocks_of, last_blocks


def refusal(model: nn.Module, blocks: int) -> str | None:
    """Why a model cannot be trained so, with the fix; None when it can."""
    there = len(blocks_of(model))
    if blocks >= there:
        return f"the model has {there} blocks, and backprop through its last {blocks} leaves none before them: choose fewer, or fo-adamw"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    deep = set(last_blocks(model, blocks))
    if not deep:
        return "nothing is trained in the last blocks, where it would use backprop: choose mezo"
    if deep == trained:
        return "nothing is trained before the last blocks, where it would use forward passes alone: choose fo-adamw"
    return None
