"""GPT-2's ``Conv1D`` of transformers, recognized by its name: y = x W + b, W (n, m), transposed relative to ``nn.Linear``.

- Low-rank hook: y += (x A) Vᵀ; A is on the input side.
- Batched: as in ``linear``, with a batched product of the input and the trained factor of each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from zotune.forward.batched import BatchedParameter, context_of, low_rank_of, low_rank_output, require_batchable, vector_by_block
from zotune.forward.layers.rule import Example, Function, LayerRule, add_product, register
from zotune.weights.layouts import Layout


def batched_addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """y = b + x W, W (n, m), with a point per block of rows: x (A + s U_g), then Vᵀ."""
    require_batchable(x, beta != 1 or alpha != 1)
    context = context_of(bias, weight)
    blocks, width = context.blocks, weight.shape[1]
    x = context.expand_rows(x, 1)
    rows = x.reshape(blocks, -1, x.shape[-1])
    first = vector_by_block(bias)
    assert first is not None
    if not isinstance(weight, BatchedParameter):
        return first.expand(blocks, rows.shape[1], width).contiguous().view(-1, width).addmm_(x, weight)
    if weight.low_rank is None:
        return torch.baddbmm(first, rows, weight.block_values()).view(-1, width)
    output = low_rank_output(first, x, weight, fixed_first=low_rank_of(weight).transposed)
    return output.view(-1, width).addmm_(x, weight.stored)


class Conv1D(LayerRule):
    """A module of that name with ``nf`` outputs; transformers is not imported."""

    batched: ClassVar[Mapping[str, Function]] = {"addmm": batched_addmm}

    def owns(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf")

    def has_hook(self, module: nn.Module) -> bool:
        return True

    def add_low_rank(self, left: Tensor, right: Tensor, x: Tensor, output: Tensor) -> Tensor:
        return add_product(output, x @ left.to(x.dtype), right.T)

    def layout(self, module: nn.Module) -> Layout | None:
        if not self.owns(module):
            return None
        return Layout(module.weight.shape[0], module.nf, False)  # type: ignore[arg-type, index, union-attr]

    def examples(self) -> Iterable[Example]:
        yield Example("", lambda: _Twin(80, 96), lambda rows: torch.randn(rows, 3, 80))


class _Twin(nn.Module):
    """The computation of transformers' Conv1D."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


_Twin.__name__ = "Conv1D"

register(Conv1D())
