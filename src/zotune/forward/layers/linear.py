"""``nn.Linear``: y = x Wᵀ + b, W (m, n).

- Low-rank hook: y += (x V) Aᵀ.
- Batched: one thin product of the input and one batched product with the bias, into which W's product is then added; a weight a block
  where that costs less; for a matrix in full space the weights of a direction's blocks, from one draw of it.
- Materialized: W + A Vᵀ for one product, where the layer sees many rows.
- Lazy: a strip of rows after another in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.forward import lazy_weight
from zotune.forward.batched import BatchedParameter, context_of, low_rank_of, low_rank_output, require_batchable, stored, trained_factor
from zotune.forward.layers.rule import Example, Function, LayerRule, add_product, register
from zotune.forward.lazy_weight import LazyWeight, in_strips, whole
from zotune.forward.materialized import MaterializedWeight, formed, forms, may_form
from zotune.io.memory_tags import tagged
from zotune.rng.directions import Key
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.weights.layouts import Layout
from zotune.weights.quantized_linear import QuantizedLinear, owner_of

#: Most blocks of one forward that a layer forms weights for.
MAX_MATERIALIZED_BLOCKS = 8


# -- batched ------------------------------------------------------------------------------------------------------------------------------


@tagged("activations")
def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, with a point a block of rows.

    Args:
        x: (..., n), B · q rows in all.
        weight: (m, n), batched or not.
        bias: (m,), batched or not.
    """
    require_batchable(x)
    context = context_of(weight, bias)
    x = context.spread(x, 1)
    blocks, width = context.blocks, weight.shape[0]
    if isinstance(weight, BatchedParameter) and not weight.coordinate.thin:
        return _batched_dense(x, weight, bias).view(*x.shape[:-1], width)
    if isinstance(weight, BatchedParameter) and weight.low_rank is None:
        weights = weight.full().transpose(1, 2)
        rows = x.reshape(blocks, -1, x.shape[-1])
        if isinstance(bias, BatchedParameter):
            product = torch.baddbmm(bias.full().unsqueeze(1), rows, weights)
        else:
            product = torch.bmm(rows, weights) if bias is None else torch.baddbmm(bias, rows, weights)
        return product.view(*x.shape[:-1], width)
    flat, plain = x.reshape(-1, x.shape[-1]), stored(weight)
    assert plain is not None
    first = bias.full().unsqueeze(1) if isinstance(bias, BatchedParameter) else bias
    if isinstance(weight, BatchedParameter):
        if forms(low_rank_of(weight), flat.shape[0] // blocks) and blocks <= MAX_MATERIALIZED_BLOCKS:
            return _batched_materialized(flat, weight, bias).view(*x.shape[:-1], width)
        output = low_rank_output(first, x, weight, fixed_first=not low_rank_of(weight).transposed)
        if owner_of(low_rank_of(weight).parameter) is not None:
            return output.view(*x.shape[:-1], width)  # the layer itself has computed the rest
    else:
        assert first is not None
        output = first.expand(blocks, flat.shape[0] // blocks, width).contiguous()
    return output.view(-1, width).addmm_(flat, plain.T).view(*x.shape[:-1], width)


def _batched_dense(x: Tensor, weight: BatchedParameter, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b, (B, q, m), with a weight a block of a matrix in full space: of all of it, or a strip after the other on a CPU."""
    coordinate, context = weight.coordinate, weight.context
    assert isinstance(coordinate, FullCoordinate)
    (height, columns), stack = coordinate.shape, context.stack
    rows = x.reshape(context.blocks, -1, columns)
    out = x.new_empty(context.blocks, rows.shape[1], height)
    strip = max(1, lazy_weight.STRIP // columns) if coordinate.numel > lazy_weight.LARGE and x.device.type == "cpu" else height
    for group, (direction, scales) in enumerate(zip(stack.directions, stack.scales, strict=True)):
        blocks = range(group * len(scales), (group + 1) * len(scales))
        if context.hold:
            for block, one in zip(blocks, context.both(coordinate, direction, scales), strict=True):
                _product(rows[block], one, bias, block, out[block])
            continue
        if not coordinate.is_active(stack.step, direction):
            for block in blocks:
                _product(rows[block], weight.plain, bias, block, out[block])
            continue
        key = Key(stack.seed, stack.step, direction, coordinate.name)
        for part, weights in coordinate.strips_at_scales(context.directions, key, scales, strip):
            for block, one in zip(blocks, weights, strict=True):
                if strip >= height:
                    _product(rows[block], one, bias, block, out[block])
                else:
                    torch.mm(rows[block], one.T, out=out[block][:, part])
    if bias is not None and strip < height:
        out += bias.full().unsqueeze(1) if isinstance(bias, BatchedParameter) else bias
    return out


def _batched_materialized(flat: Tensor, weight: BatchedParameter, bias: Tensor | None) -> Tensor:
    """y = x (W + A_b Vᵀ)ᵀ + b, (B, q, m), from a weight a block."""
    coordinate = low_rank_of(weight)
    weights = formed(coordinate, trained_factor(weight, torch.float32))
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
        torch.addmm(bias.full()[block] if isinstance(bias, BatchedParameter) else bias, rows, weight.T, out=out)


# -- one point ----------------------------------------------------------------------------------------------------------------------------


def materialized_linear(x: Tensor, weight: MaterializedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x (W + A Vᵀ)ᵀ + b: the weight is materialized for many rows, for few the thin products are added."""
    coordinate = weight.coordinate
    if forms(coordinate, x.numel() // x.shape[-1]):
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
    coordinate = weight.coordinate
    if isinstance(coordinate, FullCoordinate):
        if weight.room.takes(coordinate):
            room = weight.room.of(coordinate.numel, coordinate.parameter)
            return F.linear(input, coordinate.at_in(room, weight.directions, weight.offset), bias)
        if not in_strips(coordinate):
            return F.linear(input, weight.whole(), bias)
    rows, columns = weight.shape
    x = input.reshape(-1, columns)
    out = x.new_empty(x.shape[0], rows)
    few = lazy_weight.STRIP if isinstance(coordinate, FullCoordinate) else lazy_weight.LOW_RANK_STRIP[weight.device.type == "cpu"]
    for strip, part in coordinate.strips_at(weight.directions, weight.offset, max(1, few // columns)):
        torch.mm(x, part.T, out=out[:, strip])
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

    def is_lazy_in_full(self, module: nn.Module, coordinate: FullCoordinate, room: lazy_weight.Room) -> bool:
        return in_strips(coordinate) or room.takes(coordinate)

    def is_lazy_low_rank(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        return coordinate.parameter.numel() > lazy_weight.LOW_RANK_STRIP[coordinate.device.type == "cpu"] and self.has_hook(module)

    def materializes(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        return self.has_hook(module) and may_form(coordinate)

    def shared_width(self, module: nn.Module, coordinate: LowRankCoordinate) -> int | None:
        return None if coordinate.transposed else coordinate.parameter.shape[1]

    def layout(self, module: nn.Module) -> Layout | None:
        return Layout(module.in_features, module.out_features, True) if isinstance(module, nn.Linear) else None

    def examples(self) -> Iterable[Example]:
        for bias in (True, False):
            yield Example(f"bias={bias}", partial(nn.Linear, 80, 96, bias), lambda rows: torch.randn(rows, 3, 80))


register(Linear())
