"""Sparse full space with a static mask: of every matrix the numbers to which the loss is most sensitive, by index (SensZOQ)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, block_size
from zotune.subspaces.base import Space
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.full import FullCoordinate
from zotune.weights.precision import HALF, join, split_into

#: ε of the differences.
EPS = 1e-3
#: Number of the step whose directions are used, beyond those of any run, ``layer_scales`` and ``calibration``.
STEP = 1 << 60

SIGNS = Directions("rademacher")

#: ``losses(offset, moved)``: losses of the step's micro-batches, one after the other, with the coordinates ``moved`` at θ + offset.
Losses = Callable[..., Iterator[Tensor]]


class IndexedCoordinate(Coordinate):
    """θ = W[index], k numbers of one weight, int32 indices into it laid out flat. A residual, where there is one, has k numbers too."""

    thin = False

    def __init__(self, name: str, parameter: nn.Parameter, count: int) -> None:
        super().__init__(name, parameter, (count,))
        self.index = torch.arange(count, dtype=torch.int32, device=parameter.device)
        self.half = parameter.dtype in HALF
        self.residual = torch.zeros(count, dtype=torch.int16, device=parameter.device) if self.half else None

    def begin_step(self, seed: int, step: int) -> None:
        if self.observed is not None:
            self.index, self.observed = self.observed.to(self.device), None

    def _store(self, weight: Tensor, value: Tensor, residual: Tensor | None) -> None:
        if residual is not None:
            upper = torch.empty_like(value, dtype=weight.dtype)
            split_into(value, upper, residual)
            value = upper
        weight.view(-1).index_copy_(0, self.index.long(), value.to(weight.dtype))

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        if offset is None:
            return self.parameter.detach()
        key = offset.key(self.name)
        moved = torch.add(self.value(), directions.draw(key, self.shape, self.device), alpha=offset.scale)
        weight = self.parameter.detach().clone(memory_format=torch.contiguous_format)
        weight.view(-1).index_copy_(0, self.index.long(), moved.to(weight.dtype))
        return weight

    @tagged("directions")
    def value(self) -> Tensor:
        stored = self.parameter.detach().reshape(-1)[self.index.long()]
        return stored.float() if self.residual is None else join(stored, self.residual)

    @tagged("directions")
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        data = self.parameter.data
        if data.is_contiguous():
            self._store(data, value, self.residual)
            return
        flat = data.contiguous()
        self._store(flat, value, self.residual)
        data.copy_(flat)

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        value = self.value()
        if keep != 1.0:
            value.mul_(keep)
        self.assign(value.add_(self.weighted(directions, weights, seed, step)), seed, step)

    def reset(self) -> None:
        if self.residual is not None:
            self.residual.zero_()

    def kept(self) -> list[Tensor]:
        return [self.index] if self.residual is None else [self.index, self.residual]

    def state(self) -> dict[str, Tensor]:
        return {"index": self.index} | ({} if self.residual is None else {"residual": self.residual})

    @tagged("directions")
    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        self.index = state["index"].to(self.device, copy=True)
        if self.residual is not None:
            self.residual.copy_(state["residual"].to(self.device))


@dataclass(frozen=True)
class Sensitive(Space):
    """Of every matrix the fraction ``density`` of the numbers with the largest squared gradient moves; vectors (bias, norm) move whole.

    Args:
        density: the fraction, in (0, 1].
        directions: 0: squared gradients by backpropagation; K: estimated from loss differences along K directions.

    Raises:
        ValueError: one of them does not lie there.
    """

    density: float = 1e-3
    directions: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.density, (int, float)) and 0 < self.density <= 1):
            raise ValueError(f"density must lie in (0, 1], not {self.density!r}.")
        if not (isinstance(self.directions, int) and self.directions >= 0):
            raise ValueError(f"mask_directions must be a whole number of at least 0 (0: by backpropagation), not {self.directions!r}.")

    def _count(self, shape: Sequence[int]) -> int:
        return max(1, round(self.density * math.prod(shape)))

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        if parameter.dim() < 2:
            return FullCoordinate(name, parameter)
        return IndexedCoordinate(name, parameter, self._count(parameter.shape))

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        if len(shape) < 2:
            return math.prod(shape), 0
        return self._count(shape), self._count(shape)

    def memory(self, update_rule_state: float) -> str:
        return f"{(1 + update_rule_state) * self.density:g} × W"

    def needs_data(self, step: int) -> bool:
        return step == 0

    @tagged("directions")
    def observe(
        self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Callable[..., Iterator[Tensor]], seed: int, step: int
    ) -> dict[str, Tensor]:
        """The indices of every matrix, rising, int32, by name: by backpropagation, an example of the batch after the other, or by forwards.

        Raises:
            ValueError: backpropagation is asked for, and the loss cannot be differentiated.
        """
        indexed = [c for c in coordinates if isinstance(c, IndexedCoordinate)]
        if not indexed:
            return {}
        if self.directions:
            counts = {c.name: c.numel for c in indexed}
            return {name: _largest(found, counts[name]) for name, found in squared_gradients(indexed, losses, seed, self.directions)}
        weights = [c.parameter for c in indexed]
        flags = [weight.requires_grad for weight in weights]
        squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        try:
            for weight in weights:
                weight.requires_grad_(True)
            with torch.enable_grad():
                for found in losses():
                    if not found.requires_grad:
                        raise ValueError(
                            "a sensitivity mask needs backward passes in the first step, and the loss function returns a loss cut off from "
                            "the weights (.detach(), .item(), no_grad); return it as computed, estimate the mask by forward passes "
                            "(mask_directions=64), or use one that needs neither: zo-sparse, sparse-mezo."
                        )
                    for loss in found.reshape(-1):
                        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                        for square, grad in zip(squares, grads, strict=True):
                            if grad is not None:
                                square.add_(grad.float().square())
        finally:
            for weight, flag in zip(weights, flags, strict=True):
                weight.requires_grad_(flag)
        return {c.name: _largest(square.view(-1), c.numel) for c, square in zip(indexed, squares, strict=True)}


def _largest(scores: Tensor, count: int) -> Tensor:
    # A stable sort, so that equal scores (rows of an embedding that the batch did not use) are chosen alike everywhere.
    order = scores.sort(descending=True, stable=True).indices[:count]
    return order.sort().values.to(torch.int32)


# -- squared gradients of single weights from loss differences alone, where nothing can be differentiated ----------------------------


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
