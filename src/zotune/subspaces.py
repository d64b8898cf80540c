"""Subspaces: which coordinates θ of a model move, and the map from coordinates to weights.

A *subspace* is a small configuration (:class:`Full`, :class:`LowRank`); applied to a model it gives one *coordinate* object for each
trainable parameter. A coordinate knows how to hand out its weight at θ + offset without writing it, how to take an update, and what
must be kept to resume. Everything it keeps is float32 (or float32 split over a half-precision weight and a residual): no update is lost
to rounding.

Adapters (LoRA, prefix, prompt) need no class of their own: they are :class:`Full` over whatever parameters PEFT leaves trainable.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.coordinates import THIN, Coordinate, Offset
from zotune.directions import Directions, Key, for_blocks
from zotune.kernels import moves_for
from zotune.precision import HALF, join, split_into, stochastic_round

# -- full space -----------------------------------------------------------------------------------------------------------------------


class FullCoordinate(Coordinate):
    """θ = W. In half precision W is the upper part of a float32 value whose lower 16 bits live beside it (see ``precision``)."""

    def __init__(self, name: str, parameter: nn.Parameter, *, keep_residual: bool = True) -> None:
        super().__init__(name, parameter, parameter.shape)
        self.thin = parameter.dim() == 1 or (parameter.dim() == 2 and min(parameter.shape) <= THIN)
        self.half = parameter.dtype in HALF
        self.residual: Tensor | None = None
        if self.half and keep_residual:
            self.residual = torch.zeros(self.numel, dtype=torch.int16, device=parameter.device)

    def _block(self, flat: Tensor, part: slice) -> Tensor:
        """A block of θ in float32 (a view, where the weight is float32 itself; float64 weights stay float64)."""
        if not self.half:
            return flat[part]
        return flat[part].float() if self.residual is None else join(flat[part], self.residual[part])

    def _flat(self) -> Tensor:
        data = self.parameter.data
        return data.view(-1) if data.is_contiguous() else data.reshape(-1)

    def _store(self, flat: Tensor, part: slice, block: Tensor, key: Key) -> None:
        """Make ``block`` (flat, contiguous; its memory may be used up) a block of θ."""
        if not self.half:
            if block.data_ptr() != flat[part].data_ptr():
                flat[part] = block
        elif self.residual is None:
            flat[part] = stochastic_round(block, flat.dtype, key, part.start)
        else:
            split_into(block, flat[part], self.residual[part])

    def _finish(self, flat: Tensor) -> None:
        if not self.parameter.data.is_contiguous():
            self.parameter.data.copy_(flat.view(self.shape))

    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        if offset is None:
            return self.parameter.detach()
        flat = self._flat()
        if self.thin:  # drawn once for both evaluations and the update
            move = self.many(directions, offset.seed, offset.step, offset.direction, 1).view(-1) * offset.scale
            return torch.add(self._block(flat, slice(0, self.numel)), move).to(flat.dtype).view(self.shape)
        out = torch.empty_like(flat)
        self._perturb(directions, offset, flat, out, slice(0, self.numel), self.move_scale(directions, offset))
        return out.view(self.shape)

    def move_scale(self, directions: Directions, offset: Offset) -> float:
        """What the numbers of the direction are multiplied by at ``offset``."""
        return offset.scale * directions.scale(offset.key(self.name), self.numel, self.device)

    def _perturb(self, directions: Directions, offset: Offset, flat: Tensor, out: Tensor, whole: slice, scale: float) -> None:
        """Write elements ``whole`` of the perturbed weight to ``out``."""
        key = offset.key(self.name)
        kernel = moves_for(flat, self.residual) if directions.dense else None
        if kernel is not None and out.numel() == self.numel:
            kernel.perturb(directions, key, scale, flat, self.residual, out)
            return

        def perturb(part: slice) -> None:
            move = directions.block(key, part, self.device, scale)
            here = out[part.start - whole.start : part.stop - whole.start]
            if self.half:
                here.copy_(move.add_(self._block(flat, part)))
            else:
                torch.add(flat[part], move, out=here)

        for_blocks(whole.stop, self.device, perturb, whole.start)

    def strips_at(self, directions: Directions, offset: Offset, height: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, these rows of :meth:`at`) for strips of ``height`` rows of a matrix that is not thin; each in the memory of the last."""
        flat, columns = self._flat(), self.shape[1]
        scale = self.move_scale(directions, offset)
        room = torch.empty(height * columns, dtype=flat.dtype, device=flat.device)
        for top in range(0, self.shape[0], height):
            rows = slice(top, min(self.shape[0], top + height))
            strip = room[: (rows.stop - top) * columns]
            self._perturb(directions, offset, flat, strip, slice(top * columns, rows.stop * columns), scale)
            yield rows, strip.view(-1, columns)

    def rows_at(self, directions: Directions, offset: Offset, rows: Tensor) -> Tensor:
        """Rows ``rows`` (int64, (R,)) of :meth:`at` for a matrix that is not thin, bit for bit, without the others."""
        key, columns = offset.key(self.name), self.shape[1]
        move = directions.rows(key, rows, columns).mul_(self.move_scale(directions, offset))
        weight = self.parameter.detach()[rows]
        if self.residual is not None:
            weight = join(weight, self.residual.view(self.shape)[rows])
        return torch.add(weight, move).to(self.parameter.dtype)

    def value(self) -> Tensor:
        flat = self._flat()
        return self._block(flat, slice(0, self.numel)).view(self.shape)

    def assign(self, value: Tensor, seed: int, step: int) -> None:
        if value.data_ptr() == self.parameter.data_ptr():  # a float32 weight was handed out as it is and updated in place
            return
        flat, new = self._flat(), value.reshape(-1)
        key = Key(seed, step, 0, self.name, "rounding")
        keep = self.residual is not None  # storing uses up what it is given
        for_blocks(self.numel, self.device, lambda part: self._store(flat, part, new[part].clone() if keep else new[part], key))
        self._finish(flat)

    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        if keep == 1.0 and not any(weights):
            return
        flat = self._flat()
        rounding = Key(seed, step, 0, self.name, "rounding")
        if self.thin:
            whole = slice(0, self.numel)
            block = self._block(flat, whole)
            if keep != 1.0:
                block.mul_(keep)
            self._add_weighted(block, directions, weights, seed, step)
            self._store(flat, whole, block, rounding)
            self._finish(flat)
            return
        keys = [(Key(seed, step, direction, self.name), weight) for direction, weight in enumerate(weights) if weight]
        moves = [(key, weight * directions.scale(key, self.numel, self.device)) for key, weight in keys]
        kernel = moves_for(flat, self.residual) if directions.dense else None
        if kernel is not None and moves:
            for place, (key, scale) in enumerate(moves):
                kernel.update(directions, key, scale, flat, self.residual, 1.0 if place else keep)
            self._finish(flat)
            return

        def move(part: slice) -> None:
            block = self._block(flat, part)
            if keep != 1.0:
                block = block.mul_(keep)
            directions.add_to(block, part, moves)
            self._store(flat, part, block, rounding)

        for_blocks(self.numel, self.device, move)
        self._finish(flat)

    def add_product(self, left: Tensor, right: Tensor, seed: int, step: int, keep: float = 1.0) -> None:
        """W ← keep · W + left · rightᵀ for a matrix W (m, n), left (m, r), right (n, r): a block of rows at a time."""
        columns = self.parameter.shape[1]
        rounding = Key(seed, step, 0, self.name, "rounding")
        flat = self._flat()
        for rows in self._row_blocks():
            part = slice(rows.start * columns, rows.stop * columns)
            block = self._block(flat, part)
            block.view(-1, columns).addmm_(left[rows].to(block.dtype), right.T.to(block.dtype), beta=keep)
            self._store(flat, part, block, rounding)
        self._finish(flat)

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """W + left · rightᵀ in W's dtype, a new tensor, made like :meth:`add_product`."""
        columns, flat = self.parameter.shape[1], self._flat()
        out = torch.empty(self.shape, dtype=flat.dtype, device=flat.device)
        for rows in self._row_blocks():
            block = self._block(flat, slice(rows.start * columns, rows.stop * columns)).view(-1, columns)
            out[rows] = torch.addmm(block, left[rows].to(block.dtype), right.T.to(block.dtype))
        return out

    def _row_blocks(self) -> Iterator[slice]:
        """Rows of a matrix, about as many at a time as a cache holds."""
        rows, columns = self.parameter.shape
        height = max(1, (1 << 17) // columns)
        return (slice(top, min(rows, top + height)) for top in range(0, rows, height))

    def store(self) -> Tensor | None:
        return self.parameter.data if self.parameter.is_contiguous() else None

    def store_residual(self) -> Tensor:
        assert self.residual is not None
        return self.residual

    def reset(self) -> None:
        if self.residual is not None:
            self.residual.zero_()

    def state(self) -> dict[str, Tensor]:
        return {} if self.residual is None else {"residual": self.residual}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        if self.residual is not None:
            self.residual.copy_(state["residual"].to(self.device))


# -- low rank -------------------------------------------------------------------------------------------------------------------------


class LowRankCoordinate(Coordinate):
    """θ = A of W + A Vᵀ: W (m, n) the parameter as stored, A (m, r) float32, V (n, r) ~ N(0, 1) redrawn every ``interval`` steps.

    A starts at 0 after each redraw; at the redraw A Vᵀ is folded into W. In between W is not written at all: where the modules that own
    W have a *side path* (``side_path=True``; see ``probe``) they add (x V) Aᵀ to their output. Where they have none, the update is
    folded after every step instead and A is always 0.

    The gradient in A is G V; the update −η c U Vᵀ / r of LOZO (2410.07698) is therefore SGD on A with rate η / r (``lr_scale``), which
    makes E[c U Vᵀ] / r = G: unbiased for the whole matrix.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int) -> None:
        rows, columns = parameter.shape
        super().__init__(name, parameter, (rows, rank), lr_scale=1.0 / rank)
        self.rank, self.interval = rank, interval
        self.scale = 1.0  # σ of the layer (see ``layer_scales``), which V carries
        self.side_path = True
        self.a = torch.zeros(rows, rank, device=parameter.device)
        self.v = torch.zeros(columns, rank, device=parameter.device)
        self.pending = False  # whether A is anything but 0
        self.keep = 1.0  # weight decay that W has still to take at the next fold
        self.moved: Tensor | None = self.a  # A, A + offset during an evaluation, None while the side path is to keep out
        self.clock = (0, 0)  # (seed, step) of the last change, the key of the fold's rounding
        self._merged: weakref.ref[Tensor] | None = None
        self._weight = FullCoordinate(name, parameter, keep_residual=False)

    def begin_step(self, seed: int, step: int) -> Tensor | None:
        if step % self.interval:
            return None
        self.fold()
        old = self.v
        self._draw_v(seed, step)
        return old.T @ self.v / (self.v.shape[0] * self.scale**2) if step else None

    def rescale(self, scale: float, seed: int, step: int) -> Tensor:
        """Change σ at a redraw; the matrix T that carries first moments M over as M ← M T."""
        assert not self.pending and step % self.interval == 0, f"{self.name} has moved since V was drawn"
        ratio, self.scale = scale / self.scale, scale
        self._draw_v(seed, step)
        return torch.eye(self.rank, device=self.device) / ratio

    def _draw_v(self, seed: int, step: int) -> None:
        redraw = step // self.interval
        v = Directions("gaussian").draw(Key(seed, redraw, 0, self.name, "subspace"), self.v.shape, self.device)
        if self.scale != 1.0:
            v *= self.scale
        self.v = v.T.contiguous().T  # r rows of n numbers: on a CPU x V is many times faster so

    def _u(self, directions: Directions, offset: Offset) -> Tensor:
        return self.many(directions, offset.seed, offset.step, offset.direction, 1)[0]

    def shift(self, directions: Directions, offset: Offset | None) -> None:
        """Make the side path use A + offset (None: A)."""
        self.moved = self.a if offset is None else torch.add(self.a, self._u(directions, offset), alpha=offset.scale)

    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        a = self.a if offset is None else torch.add(self.a, self._u(directions, offset), alpha=offset.scale)
        if offset is None and not self.pending:
            return self.parameter.detach()
        return self._weight.plus_product(a, self.v)

    def value(self) -> Tensor:
        return self.a

    def assign(self, value: Tensor, seed: int, step: int) -> None:
        if value.data_ptr() != self.a.data_ptr():
            self.a.copy_(value)
        self._changed(seed, step)

    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        self.decay(keep)
        self._add_weighted(self.a, directions, weights, seed, step)
        self._changed(seed, step)

    def decay(self, keep: float) -> None:
        # W itself takes its share of the decay at the next fold: an interval late, in exchange for no pass over W.
        if keep != 1.0:
            self.a.mul_(keep)
            self.keep *= keep

    @property
    def decays_weights(self) -> bool:
        return False

    def store(self) -> Tensor | None:
        return self.a

    def descended(self, keep: float, seed: int, step: int) -> None:
        self.keep *= keep
        self._changed(seed, step)

    def _changed(self, seed: int, step: int) -> None:
        self.pending = True
        self.clock = (seed, step)
        self._merged = None
        if not self.side_path:
            self.fold()

    def fold_every_step(self) -> None:
        """Go without a side path. W is then written every step, so in half precision it needs a residual as in full space."""
        assert not self.pending
        self.side_path = False
        self._weight = FullCoordinate(self.name, self.parameter)

    def fold(self) -> None:
        """W ← W + A Vᵀ, A ← 0; a half-precision W rounds stochastically, keyed by the step that changed A last."""
        if not self.pending and self.keep == 1.0:
            return
        self._weight.add_product(self.a, self.v, *self.clock, keep=self.keep)
        self._clear()

    def merged(self) -> Tensor:
        """What :meth:`fold` would make of W, as a copy; the same tensor for every owner of a shared weight."""
        if not self.pending and self.keep == 1.0:
            return self.parameter.detach()
        merged = None if self._merged is None else self._merged()
        if merged is not None:
            return merged
        merged = self.parameter.detach().clone()
        copy = FullCoordinate(self.name, nn.Parameter(merged, requires_grad=False), keep_residual=False)
        copy.add_product(self.a, self.v, *self.clock, keep=self.keep)
        self._merged = weakref.ref(merged)
        return merged

    def _clear(self) -> None:
        self.a.zero_()
        self.pending, self.keep, self._merged = False, 1.0, None

    def reset(self) -> None:
        self._clear()
        self._weight.reset()

    def state(self) -> dict[str, Tensor]:
        if not self.pending and self.keep == 1.0:
            return self._weight.state()
        # W as stored goes along because the model's own state dict carries the merged weights, from which W cannot be had back exactly.
        return {
            "a": self.a,
            "base": self.parameter.detach(),
            "keep": torch.tensor(self.keep, dtype=torch.float64),
            "clock": torch.tensor(self.clock[1]),
        }

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        self.reset()
        if step:
            self._draw_v(seed, step - 1)
        if "residual" in state:
            self._weight.load_state(state, seed, step)
        if "a" in state:
            self.a.copy_(state["a"].to(self.device))
            self.parameter.data.copy_(state["base"].to(self.device))
            self.pending, self.keep, self.clock = True, float(state["keep"]), (seed, int(state["clock"]))


# -- configurations --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Full:
    """Every trainable parameter moves in its own full space."""

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        return FullCoordinate(name, parameter)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        """(numbers in θ, float32 numbers kept beside the weights) for a parameter of this shape."""
        return math.prod(shape), 0


@dataclass(frozen=True)
class LowRank:
    """Matrices move as W + A Vᵀ (LOZO, 2410.07698); vectors (bias, norm) and tensors of other ranks move in full space.

    Args:
        rank: columns r of A (m, r) and V (n, r).
        interval: steps between two redraws of V (ν in the paper).
        layer_scales: measure a scale for each layer's directions (see ``layer_scales``).

    Raises:
        ValueError: rank or interval is below 1.
    """

    rank: int = 2
    interval: int = 50
    layer_scales: bool = False

    def __post_init__(self) -> None:
        for field in ("rank", "interval"):
            number = getattr(self, field)
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, not {number!r}.")

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        if parameter.dim() != 2 or min(parameter.shape) <= self.rank:
            return FullCoordinate(name, parameter)
        return LowRankCoordinate(name, parameter, self.rank, self.interval)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        """(numbers in θ, float32 numbers kept beside the weights) for a parameter of this shape."""
        if len(shape) != 2 or min(shape) <= self.rank:
            return math.prod(shape), 0
        moving = shape[0] * self.rank
        return moving, moving + shape[1] * self.rank


Subspace = Full | LowRank
