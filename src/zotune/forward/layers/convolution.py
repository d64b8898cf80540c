"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: y = W ∗ x + b, W (m, n / groups, *kernel), trained as a matrix (m, n / groups · kernel).

- Batched, low rank: x is convolved with the columns of V as filters once, and the result multiplied by the A of its block.
- Batched otherwise: the blocks' weights, as groups of one convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.forward.batched import BatchedParameter, context_of, require_batchable, trained_factor
from zotune.forward.layers.rule import Example, Function, LayerRule, register


def _batched(convolve: Callable[..., Tensor]) -> Function:
    """The batched form of one of torch's convolutions."""

    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Tensor:
        """y = W ∗ x + b for x (rows, n, *space), with a point per block of rows."""
        require_batchable(x, x.dim() != weight.dim())
        context = context_of(weight, bias)
        x = context.expand_rows(x, x.dim() - 1)
        apply = partial(convolve, bias=None, stride=stride, padding=padding, dilation=dilation)
        low_rank = weight.low_rank if isinstance(weight, BatchedParameter) else None
        if not isinstance(weight, BatchedParameter):
            out = apply(x, weight, groups=groups)
        elif low_rank is not None and not low_rank.transposed:
            out = apply(x, weight.stored, groups=groups)
            filters = low_rank.v.T.to(x.dtype).reshape(-1, *weight.shape[1:])
            z = apply(x, filters.repeat(groups, *[1] * (x.dim() - 1)), groups=groups)
            z = z.reshape(context.blocks, -1, groups, low_rank.rank, z[0, 0].numel())
            a = trained_factor(weight, x.dtype).unflatten(1, (groups, -1)).unsqueeze(1)
            out += (a @ z).view(out.shape)
        else:
            weights = weight.block_values() if low_rank is None else _block_weights(weight)
            by_block = x.unflatten(0, (context.blocks, -1)).transpose(0, 1).flatten(1, 2)
            out = apply(by_block, weights.flatten(0, 1), groups=groups * context.blocks)
            out = out.unflatten(1, (context.blocks, -1)).transpose(0, 1).flatten(0, 1)
        if isinstance(bias, BatchedParameter):
            places = (context.blocks, 1, -1, *[1] * (out.dim() - 2))
            return (out.unflatten(0, (context.blocks, -1)) + bias.block_values().view(places)).flatten(0, 1)
        return out if bias is None else out + bias.view(-1, *[1] * (out.dim() - 2))

    return convolution


def _block_weights(weight: BatchedParameter) -> Tensor:
    """W + V A_bᵀ of every block, (B, *shape)."""
    assert weight.low_rank is not None
    product = weight.low_rank.v @ trained_factor(weight, torch.float32).mT
    return (weight.stored + product.view(-1, *weight.shape)).to(weight.dtype)


class Convolution(LayerRule):
    """Convolutions over one to three dimensions; what a model calls with their functions has the same batched form."""

    batched: ClassVar[Mapping[str, Function]] = {"conv1d": _batched(F.conv1d), "conv2d": _batched(F.conv2d), "conv3d": _batched(F.conv3d)}

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def examples(self) -> Iterable[Example]:
        yield Example("one dimension", partial(nn.Conv1d, 12, 20, 5, padding=4), lambda rows: torch.randn(rows, 12, 9))
        yield Example("depthwise", partial(nn.Conv1d, 80, 80, 4, groups=80, bias=False), lambda rows: torch.randn(rows, 80, 9))
        two = partial(nn.Conv2d, 12, 20, (3, 5), stride=2, padding="valid", groups=2)
        yield Example("two dimensions, groups", two, lambda rows: torch.randn(rows, 12, 9, 8))
        yield Example("reflected", partial(nn.Conv2d, 6, 70, 4, padding=2, padding_mode="reflect"), lambda rows: torch.randn(rows, 6, 7, 7))


register(Convolution())
