"""Sparse full space with a static mask: the elements of every matrix with the largest squared gradients, by index (SensZOQ)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, block_size
from zotune.subspaces.base import Losses, Subspace, check_density
from zotune.subspaces.coordinate import Coordinate, Offset, matching, shrink
from zotune.subspaces.full import FullCoordinate
from zotune.subspaces.scaled_directions import TransformedCoordinate
from zotune.weights.precision import HALF, join, split_into

#: ε of the differences.
EPS = 1e-3
#: The step of their directions, beyond the steps of any run, of ``layer_scales`` and of ``calibration``.
STEP = 1 << 60

SIGNS = Directions("rademacher")


class IndexedCoordinate(Coordinate):
    """θ = W[index], k elements of one weight by int32 indices into the flat weight. A half-precision W has a residual of k elements."""

    thin = False

    def __init__(self, name: str, parameter: nn.Parameter, count: int) -> None:
        super().__init__(name, parameter, (count,))
        self.index = torch.arange(count, dtype=torch.int32, device=parameter.device)
        self.residual = torch.zeros(count, dtype=torch.int16, device=parameter.device) if parameter.dtype in HALF else None

    def begin_step(self, seed: int, step: int) -> None:
        if self.observed is not None:
            self.index, self.observed = self.observed.to(self.device), None

    def _write(self, weight: Tensor, value: Tensor, residual: Tensor | None) -> None:
        if residual is not None:
            upper = torch.empty_like(value, dtype=weight.dtype)
            split_into(value, upper, residual)
            value = upper
        weight.view(-1).index_copy_(0, self.index.long(), value.to(weight.dtype))

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        if offset is None:
            return self.parameter.detach()
        perturbed = torch.add(self.value(), directions.draw(offset.key(self.name), self.shape, self.device), alpha=offset.scale)
        weight = self.parameter.detach().clone(memory_format=torch.contiguous_format)
        self._write(weight, perturbed, None)
        return weight

    @tagged("directions")
    def value(self) -> Tensor:
        stored = self.parameter.detach().reshape(-1)[self.index.long()]
        return stored.float() if self.residual is None else join(stored, self.residual)

    @tagged("directions")
    def decayed(self, value: Tensor, keep: float) -> Tensor:
        return shrink(value, keep, None if self.anchor is None else self.anchor[self.index.long().to(self.anchor.device)])

    @tagged("directions")
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        data = self.parameter.data
        flat = data.contiguous()
        self._write(flat, value, self.residual)
        if flat.data_ptr() != data.data_ptr():
            data.copy_(flat)

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        value = self.decayed(self.value(), keep)
        self.assign(value.add_(self.weighted(directions, weights, seed, step)), seed, step)

    def reset(self) -> None:
        if self.residual is not None:
            self.residual.zero_()

    def kept(self) -> list[Tensor]:
        return list(self.state().values())

    def state(self) -> dict[str, Tensor]:
        return {"index": self.index} | ({} if self.residual is None else {"residual": self.residual})

    @tagged("directions")
    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        self.index = state["index"].to(self.device, copy=True)
        if self.residual is not None:
            self.residual.copy_(matching(state["residual"], self.residual, self.name))


@dataclass(frozen=True)
class Sensitive(Subspace):
    """The fraction ``density`` of every matrix with the largest squared gradients is trained; vectors (bias, norm) are trained whole.

    Args:
        density: the fraction, in (0, 1].
        directions: 0: squared gradients by backpropagation; K: estimated from loss differences along K directions.

    Raises:
        ValueError: density or directions is out of range.
    """

    density: float = 1e-3
    directions: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
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
    def observe(self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Losses, seed: int, step: int) -> dict[str, Tensor]:
        """The indices of every matrix, sorted, int32, by name, from backpropagation of one example after the other, or from forwards.

        Raises:
            ValueError: backpropagation is requested, and the loss cannot be differentiated.
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
    # A stable sort: equal scores (rows of an embedding that the batch did not use) are chosen alike on all devices.
    order = scores.sort(descending=True, stable=True).indices[:count]
    return order.sort().values.to(torch.int32)


# -- squared gradients from loss differences, where the loss cannot be differentiated ---------------------------------------------


class _SignCoordinate(TransformedCoordinate):
    """All elements of a parameter, with Rademacher directions whatever the method's are."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.thin = False  # drawn in blocks, as squared_gradients draws them

    def transformed(self, directions: Directions, seed: int, step: int) -> Directions:
        return SIGNS


@tagged("directions")
def squared_gradients(coordinates: Sequence[Coordinate], losses: Losses, seed: int, count: int) -> Iterator[tuple[str, Tensor]]:
    """(name, estimate of Σ_b (∂ℓ_b/∂W_i)² for every element of W, flat) of each coordinate, by 2 · ``count`` forwards.

    c_bk = (ℓ_b(W + εZ_k) − ℓ_b(W − εZ_k)) / 2ε,   s_i = Σ_b ((1/K) Σ_k c_bk Z_ki)²,   Z of ±1, all these parameters together

    E s_i = Σ_b ((1 − 1/K) g_bi² + ‖g_b‖² / K) as ε → 0: the order is right in expectation. The noise of g_bi is ‖g_b‖/√K, so s finds
    weights whose share of the gradient's square exceeds about 1/K.
    """
    perturbed = {c.name: _SignCoordinate(c.name, c.parameter, keep_residual=False) for c in coordinates}
    slopes = torch.stack([_slopes(losses, perturbed, seed, k) for k in range(count)]) / count  # (K, B)
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


def _slopes(losses: Losses, perturbed: Mapping[str, FullCoordinate], seed: int, direction: int) -> Tensor:
    """c_b of every example b, float32, on the CPU."""
    high, low = (
        torch.cat([found.detach().reshape(-1).double().cpu() for found in losses(Offset(sign * EPS, seed, STEP, direction), perturbed)])
        for sign in (+1, -1)
    )
    for coordinate in perturbed.values():
        coordinate.drop()
    return ((high - low) / (2 * EPS)).float()
