"""Rows of the learning tables that go backward: AdamW on all weights, or on those alone that ``lozo-g`` trains along output gradients."""

from __future__ import annotations

import re

from torch import nn

from zotune.baselines import FirstOrder

#: Output projections, which write to the residual stream; lozo-g's check accepts these in a Llama and nothing else.
OUTPUTS = re.compile(r"\.(\d+)\.(self_attn\.o_proj|mlp\.down_proj)\.weight$")
#: Name of a row and what it trains.
ROWS = {
    "fo-adamw": "what the scheme trains",
    "fo-adamw, guided layers": "the output projections of all layers",
    "fo-adamw, last layer": "the output projections of the last layer",
}


def optimizer(model: nn.Module, row: str, lr: float, seed: int) -> FirstOrder:
    """AdamW for a row; a backward pass counts as two forward passes."""
    if row != "fo-adamw":
        found = {name: int(match[1]) for name, _ in model.named_parameters() if (match := OUTPUTS.search(name))}
        last = max(found.values())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in found and (row == "fo-adamw, guided layers" or found[name] == last))
    return FirstOrder(model, "fo-adamw", lr=lr, seed=seed)
