"""``nn.Linear``: y = x Wᵀ + b, W (m, n).

- Low-rank hook: y += (x V) Aᵀ.
- Batched, low rank: a thin product of the input and a batched product with the bias, to which W's product is added; where it costs less,
  a materialized weight per block. Batched, full space: the weights of all blocks of a direction, drawn once.
- Materialized: W + A Vᵀ for one product, where the layer sees many rows.
- Lazy: strips of rows, one after the other in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.forward import lazy_weight
from zotune.forward.batched import (
    BatchedParameter,
    context_of,
    low_rank_of,
    low_rank_output,
    require_batchable,
    trained_factor,
    vector_by_block,
)
from zotune.forward.layers.rule import Example, Function, LayerRule, add_product, register
from zotune.forward.lazy_weight import LazyWeight, WeightBuffer, in_strips, whole
from zotune.forward.materialized import MaterializedWeight, can_materialize, materialize, should_materialize
from zotune.io.memory_tags import tagged
from zotune.rng.directions import Key
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.weights.layouts import Layout
from zotune.weights.quantized_linear import QuantizedLinear, owner_of

#: Blocks of a forward for which a layer materializes weights, at most.
MAX_MATERIALIZED_BLOCKS = 8


# -- batched ------------------------------------------------------------------------------------------------------------------------------


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, with a point per block of rows.

    Args:
        x: (..., n), B · q rows in all.
        weight: (m, n), batched or not.
        bias: (m,), batched or not.
    """
    require_batchable(x)
    context = context_of(weight, bias)
    x = context.expand_rows(x, 1)
    blocks, shape = context.blocks, (*x.shape[:-1], weight.shape[0])
    if isinstance(weight, BatchedParameter) and weight.low_rank is None:
        if not weight.coordinate.thin:
            return _batched_dense(x, weight, bias).view(shape)
        weights, rows, first = weight.block_values().transpose(1, 2), x.reshape(blocks, -1, x.shape[-1]), vector_by_block(bias)
        return (torch.bmm(rows, weights) if first is None else torch.baddbmm(first, rows, weights)).view(shape)
    flat, first = x.reshape(-1, x.shape[-1]), vector_by_block(bias)
    if not isinstance(weight, BatchedParameter):
        assert first is not None
        output = first.expand(blocks, flat.shape[0] // blocks, shape[-1]).contiguous()
        return output.view(-1, shape[-1]).addmm_(flat, weight.T).view(shape)
    coordinate = low_rank_of(weight)
    if blocks <= MAX_MATERIALIZED_BLOCKS and should_materialize(coordinate, flat.shape[0] // blocks):
        return _batched_materialized(flat, weight, bias).view(shape)
    output = low_rank_output(first, x, weight, fixed_first=not coordinate.transposed)
    if owner_of(coordinate.parameter) is not None:
        return output.view(shape)  # a quantized layer adds this to its own product
    return output.view(-1, shape[-1]).addmm_(flat, weight.stored.T).view(shape)


def _batched_dense(x: Tensor, weight: BatchedParameter, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b, (B, q, m), with a full-space weight per block: whole, or in strips on a CPU."""
    coordinate, context = weight.coordinate, weight.context
    assert isinstance(coordinate, FullCoordinate)
    (height, columns), layout = coordinate.shape, context.layout
    rows = x.reshape(context.blocks, -1, columns)
    out = x.new_empty(context.blocks, rows.shape[1], height)
    strip = max(1, lazy_weight.STRIP // columns) if in_strips(coordinate) else height
    for group, (direction, scales) in enumerate(zip(layout.directions, layout.scales, strict=True)):
        blocks = range(group * len(scales), (group + 1) * len(scales))
        if context.persistent:
            for block, one in zip(blocks, context.perturbed_weights(coordinate, direction, scales), strict=True):
                _product(rows[block], one, bias, block, out[block])
            continue
        if not coordinate.is_active(layout.step, direction):
            for block in blocks:
                _product(rows[block], weight.stored, bias, block, out[block])
            continue
        key = Key(layout.seed, layout.step, direction, coordinate.name)
        for part, weights in coordinate.strips_at_scales(context.directions, key, scales, strip):
            for block, one in zip(blocks, weights, strict=True):
                if strip >= height:
                    _product(rows[block], one, bias, block, out[block])
                else:
                    torch.mm(rows[block], one.T, out=out[block][:, part])
    if strip < height and (vector := vector_by_block(bias)) is not None:
        out += vector
    return out


def _batched_materialized(flat: Tensor, weight: BatchedParameter, bias: Tensor | None) -> Tensor:
    """y = x (W + A_b Vᵀ)ᵀ + b, (B, q, m), with a materialized weight per block."""
    weights = materialize(low_rank_of(weight), trained_factor(weight, torch.float32))
    rows = flat.view(len(weights), -1, flat.shape[1])
    out = flat.new_empty(*rows.shape[:2], weights.shape[1])
    for block, one in enumerate(weights):
        _product(rows[block], one, bias, block, out[block])
    return out


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, block: int, out: Tensor) -> None:
    """out ← x Wᵀ + b of one block."""
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias.block_values()[block] if isinstance(bias, BatchedParameter) else bias, rows, weight.T, out=out)


# -- one point ----------------------------------------------------------------------------------------------------------------------------


def materialized_linear(x: Tensor, weight: MaterializedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x (W + A Vᵀ)ᵀ + b: for many rows the weight is materialized, for few the thin products are added."""
    coordinate = weight.coordinate
    if should_materialize(coordinate, x.numel() // x.shape[-1]):
        return F.linear(x, weight.whole(), bias)
    output = F.linear(x, coordinate.parameter.detach(), bias)
    left, right = coordinate.factors(weight.core)
    flat = output.view(-1, output.shape[-1])
    flat.addmm_((x @ right.to(x.dtype)).view(-1, right.shape[1]), left.T.to(flat.dtype))
    return output


@tagged("directions")
def lazy_linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """y = x (W + s Z)ᵀ + b from strips of the weight, where that saves memory."""
    plain = isinstance(weight, LazyWeight) and not isinstance(input, LazyWeight) and not isinstance(bias, LazyWeight)
    if not plain or (torch.is_grad_enabled() and input.requires_grad):
        return F.linear(whole(input), whole(weight), whole(bias))
    coordinate, directions, offset = weight.coordinate, weight.directions, weight.offset
    strip = lazy_weight.STRIP
    if not isinstance(coordinate, FullCoordinate):
        strip = lazy_weight.LOW_RANK_STRIP[weight.device.type == "cpu"]
    elif weight.buffer.accepts(coordinate):
        memory = weight.buffer.take(coordinate.numel, coordinate.parameter)
        return F.linear(input, coordinate.at_in(memory, directions, offset), bias)
    elif not in_strips(coordinate):
        return F.linear(input, weight.whole(), bias)
    rows, columns = weight.shape
    x = input.reshape(-1, columns)
    out = x.new_empty(x.shape[0], rows)
    for part, weights in coordinate.strips_at(directions, offset, max(1, strip // columns)):
        torch.mm(x, weights.T, out=out[:, part])
    if bias is not None:
        out += bias
    return out.view(*input.shape[:-1], rows)


class Linear(LayerRule):
    """``nn.Linear``, and subclasses that keep its forward."""

    batched: ClassVar[Mapping[str, Function]] = {"linear": batched_linear}
    lazy: ClassVar[Mapping[Callable[..., Any], Function]] = {F.linear: lazy_linear}
    materialized: ClassVar[Mapping[Callable[..., Any], Function]] = {F.linear: materialized_linear}

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)

    def has_hook(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward

    def add_low_rank(self, left: Tensor, right: Tensor, x: Tensor, output: Tensor) -> Tensor:
        return add_product(output, x @ right.to(x.dtype), left.T)

    def is_lazy_in_full(self, module: nn.Module, coordinate: FullCoordinate, buffer: WeightBuffer) -> bool:
        return in_strips(coordinate) or buffer.accepts(coordinate)

    def is_lazy_low_rank(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        return coordinate.parameter.numel() > lazy_weight.LOW_RANK_STRIP[coordinate.device.type == "cpu"] and self.has_hook(module)

    def materializes(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        return self.has_hook(module) and can_materialize(coordinate)

    def shared_width(self, module: nn.Module, coordinate: LowRankCoordinate) -> int | None:
        return None if coordinate.transposed else coordinate.parameter.shape[1]

    def layout(self, module: nn.Module) -> Layout | None:
        return Layout(module.in_features, module.out_features, True) if isinstance(module, nn.Linear) else None

    def examples(self) -> Iterable[Example]:
        for bias in (True, False):
            yield Example(f"bias={bias}", partial(nn.Linear, 80, 96, bias), lambda rows: torch.randn(rows, 3, 80))


register(Linear())
