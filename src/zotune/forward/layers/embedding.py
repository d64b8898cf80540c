"""``nn.Embedding``: y = W[ids], W (m, n).

- Low-rank hook: y += A[ids] Vᵀ.
- Batched: the same with the rows of each block's A. In full space: a table per block if it is thin, else the rows of the ids.
- Lazy: the rows of the ids alone, bit for bit those of the whole perturbed table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.forward.batched import BatchedParameter, require_batchable, trained_factor
from zotune.forward.layers.rule import Example, Function, LayerRule, add_product, register
from zotune.forward.lazy_weight import LazyWeight, WeightBuffer, looked_up_rows, whole
from zotune.io.memory_tags import tagged
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Offset


def batched_embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """y = W[ids], with a point per block of rows."""
    require_batchable(ids, max_norm is not None)
    assert isinstance(weight, BatchedParameter)
    context = weight.context
    if ids.dim() == 2 and ids.shape[0] % context.total == 0:
        context.input_rows = ids.shape[0]
    ids = context.expand_rows(ids, 0)
    blocks, height = context.blocks, weight.shape[0]
    by_block = ids.reshape(blocks, -1)
    if not weight.coordinate.thin:
        rows = [_perturbed_rows(weight, offset, some) for offset, some in zip(weight.offsets(), by_block, strict=True)]
        return torch.stack(rows).view(*ids.shape, -1)
    coordinate = weight.low_rank
    if coordinate is None:
        table = weight.block_values().flatten(0, 1)
        first = torch.arange(blocks, device=ids.device).unsqueeze(1) * height
        return F.embedding((by_block + first).view(ids.shape), table)
    output = F.embedding(ids, weight.stored)
    if coordinate.transposed:
        left = F.embedding(by_block, coordinate.v).to(output.dtype)
        output.view(blocks, -1, output.shape[-1]).baddbmm_(left, trained_factor(weight, output.dtype).transpose(1, 2))
        return output
    z = context.expanded_z(coordinate)
    groups, rank = z.shape[0], coordinate.rank
    by_group = ids.reshape(groups, -1)
    first = torch.arange(groups, device=ids.device).unsqueeze(1) * height
    left = F.embedding(by_group + first, z.flatten(0, 1)).view(groups, blocks // groups, -1, rank)
    left = left * context.scales(z, 2)
    if coordinate.pending or context.persistent:
        left += F.embedding(by_block, coordinate.a).view(left.shape)
    output.view(-1, output.shape[-1]).addmm_(left.view(-1, rank).to(output.dtype), coordinate.v.T.to(output.dtype))
    return output


def _perturbed_rows(weight: BatchedParameter, offset: Offset | None, ids: Tensor) -> Tensor:
    """(W + s Z)[ids] of a full-space table."""
    coordinate, directions = weight.coordinate, weight.context.directions
    assert isinstance(coordinate, FullCoordinate)
    if weight.context.persistent:
        return weight.context.perturbed_rows(coordinate, offset, ids)
    rows = None if offset is None else looked_up_rows(coordinate, directions, offset, ids)
    return F.embedding(ids, coordinate.at(directions, offset)) if rows is None else rows


@tagged("directions")
def lazy_embedding(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *others: Any, **named: Any
) -> Tensor:
    """y = (W + s Z)[ids] from the rows of the ids, where they are fewer than half of the table."""
    if max_norm is None and isinstance(weight, LazyWeight):
        rows = looked_up_rows(weight.coordinate, weight.directions, weight.offset, input)
        if rows is not None:
            return rows
    return F.embedding(whole(input), whole(weight), padding_idx, max_norm, *others, **named)


class Embedding(LayerRule):
    """``nn.Embedding``; no hook with ``max_norm``, which rescales stored rows in place."""

    batched: ClassVar[Mapping[str, Function]] = {"embedding": batched_embedding}
    lazy: ClassVar[Mapping[Callable[..., Any], Function]] = {F.embedding: lazy_embedding}

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def has_hook(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None

    def add_low_rank(self, left: Tensor, right: Tensor, x: Tensor, output: Tensor) -> Tensor:
        return add_product(output, F.embedding(x, left), right.T)

    def is_lazy_in_full(self, module: nn.Module, coordinate: FullCoordinate, buffer: WeightBuffer) -> bool:
        return True

    def is_lazy_low_rank(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        return True

    def examples(self) -> Iterable[Example]:
        ids = lambda rows: torch.randint(0, 300, (rows, 3))  # noqa: E731
        yield Example("alone", lambda: nn.Embedding(300, 80), ids)
        yield Example("tied to a head", _Tied, ids)


class _Tied(nn.Module):
    """A table tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(300, 80), nn.Linear(80, 300)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))  # type: ignore[no-any-return]


register(Embedding())
