"""Squared gradients of single weights from loss differences alone: what a sensitivity mask takes where nothing can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.coordinates import Coordinate, Offset
from zotune.directions import Directions, Key, block_size
from zotune.io.memory_tags import tagged
from zotune.subspaces.full import FullCoordinate

#: ε of the differences.
EPS = 1e-3
#: Number of the step whose directions are used, beyond those of any run, ``layer_scales`` and ``calibration``.
STEP = 1 << 60

SIGNS = Directions("rademacher")

#: ``losses(offset, moved)``: losses of the step's micro-batches, one after the other, with the coordinates ``moved`` at θ + offset.
Losses = Callable[..., Iterator[Tensor]]


class _Signs(FullCoordinate):
    """All numbers of a parameter, which move by ±1 whatever the method's own directions are."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.thin = False  # block by block, as they are put together again

    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        return super().at(SIGNS, offset)

    def at_in(self, out: Tensor, directions: Directions, offset: Offset) -> Tensor:
        return super().at_in(out, SIGNS, offset)

    def strips_at(self, directions: Directions, offset: Offset, height: int) -> Iterator[tuple[slice, Tensor]]:
        return super().strips_at(SIGNS, offset, height)

    def rows_at(self, directions: Directions, offset: Offset, rows: Tensor) -> Tensor:
        return super().rows_at(SIGNS, offset, rows)


@tagged("directions")
def squared_gradients(coordinates: Sequence[Coordinate], losses: Losses, seed: int, count: int) -> Iterator[tuple[str, Tensor]]:
    """(name, estimate of Σ_b (∂ℓ_b/∂W_i)² for every number of W, flat) of each coordinate, by ``count`` directions, 2 · ``count`` forwards.

    c_bk = (ℓ_b(W + εZ_k) − ℓ_b(W − εZ_k)) / 2ε,   s_i = Σ_b ((1/K) Σ_k c_bk Z_ki)²,   Z of ±1, all these parameters together

    E s_i = Σ_b ((1 − 1/K) g_bi² + ‖g_b‖² / K) as ε → 0: the order is right on average, and the noise of g_bi is ‖g_b‖/√K, so that weights
    are found whose share of the gradient's square is above 1/K or so.
    """
    moved = {c.name: _Signs(c.name, c.parameter, keep_residual=False) for c in coordinates}
    slopes = torch.stack([_slopes(losses, moved, seed, k) for k in range(count)]) / count  # (K, B)
    slopes = torch.where(slopes.isfinite(), slopes, 0.0)
    for coordinate in coordinates:
        device, numel = coordinate.device, coordinate.parameter.numel()
        found = torch.empty(numel, device=device)
        here = slopes.T.to(device)
        size = max(1 << 12, block_size(device) // count)
        for start in range(0, numel, size):
            part = slice(start, min(numel, start + size))
            z = [SIGNS.block(Key(seed, STEP, k, coordinate.name), part, device).clone() for k in range(count)]
            found[part] = (here @ torch.stack(z)).square_().sum(dim=0)
        yield coordinate.name, found


def _slopes(losses: Losses, moved: Mapping[str, FullCoordinate], seed: int, direction: int) -> Tensor:
    """c_b of every example b, float32, on the CPU."""
    high, low = (
        torch.cat([found.detach().reshape(-1).double().cpu() for found in losses(Offset(sign * EPS, seed, STEP, direction), moved)])
        for sign in (+1, -1)
    )
    for coordinate in moved.values():
        coordinate.drop()
    return ((high - low) / (2 * EPS)).float()
