"""Full space: every number of a parameter moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.execution import walked
from zotune.io.memory_tags import tagged
from zotune.kernels import low_rank_kernels, perturb_kernels
from zotune.rng.directions import Directions, Key, for_blocks
from zotune.subspaces.coordinate import THIN, Coordinate, Offset
from zotune.weights import placement, quantized_linear
from zotune.weights.precision import HALF, join, split_into, stochastic_round


class FullCoordinate(Coordinate):
    """θ = W. In half precision W is the upper part of a float32 value whose lower 16 bits live beside it (see ``precision``)."""

    #: Whether this process holds only some of its numbers.
    sharded = False

    @tagged("directions")
    def __init__(self, name: str, parameter: nn.Parameter, *, keep_residual: bool = True) -> None:
        super().__init__(name, parameter, parameter.shape)
        self.thin = parameter.dim() == 1 or (parameter.dim() == 2 and min(parameter.shape) <= THIN)
        self.half = parameter.dtype in HALF
        self.residual: Tensor | None = None
        if self.half and keep_residual:
            self.residual = torch.zeros(self.numel, dtype=torch.int16, device=parameter.device)
            away = placement.offload_handle(parameter)
            if away is not None:
                away.attach(self.residual)

    def _block(self, flat: Tensor, part: slice) -> Tensor:
        """A block of θ in float32 (a view, where the weight is float32 itself; float64 weights stay float64)."""
        if not self.half:
            return flat[part]
        return flat[part].float() if self.residual is None else join(flat[part], self.residual[part])

    def _rows(self, rows: Tensor) -> Tensor:
        """Rows of a matrix θ, like :meth:`_block`."""
        weight = self.parameter.detach()[rows]
        if not self.half:
            return weight
        return weight.float() if self.residual is None else join(weight, self.residual.view(self.shape)[rows])

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

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        if offset is None:
            return self.parameter.detach()
        flat = self._flat()
        if self.thin:  # drawn once for both evaluations and the update
            move = self.draw(directions, offset.seed, offset.step, offset.direction, 1).view(-1) * offset.scale
            return torch.add(self._block(flat, slice(0, self.numel)), move).to(flat.dtype).view(self.shape)
        return self.at_in(torch.empty_like(flat), directions, offset)

    @tagged("directions")
    def at_in(self, out: Tensor, directions: Directions, offset: Offset) -> Tensor:
        """:meth:`at` of a tensor that is not thin, in the memory ``out``, flat."""
        self._perturb(directions, offset, self._flat(), out, slice(0, self.numel), self.move_scale(directions, offset))
        return out.view(self.shape)

    def move_scale(self, directions: Directions, offset: Offset) -> float:
        """What the numbers of the direction are multiplied by at ``offset``."""
        return offset.scale * directions.scale(offset.key(self.name), self.numel, self.device)

    def _perturb(self, directions: Directions, offset: Offset, flat: Tensor, out: Tensor, whole: slice, scale: float) -> None:
        """Write elements ``whole`` of the perturbed weight to ``out``."""
        key = offset.key(self.name)
        kernel = perturb_kernels(flat, self.residual) if directions.dense else None
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

    @tagged("directions")
    def strips_at(self, directions: Directions, offset: Offset, height: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, these rows of :meth:`at`) for strips of ``height`` rows of a matrix that is not thin; each in the memory of the last."""
        flat, columns = self._flat(), self.shape[1]
        scale = self.move_scale(directions, offset)
        room = torch.empty(height * columns, dtype=flat.dtype, device=flat.device)
        for top in walked(range(0, self.shape[0], height)):
            rows = slice(top, min(self.shape[0], top + height))
            strip = room[: (rows.stop - top) * columns]
            self._perturb(directions, offset, flat, strip, slice(top * columns, rows.stop * columns), scale)
            yield rows, strip.view(-1, columns)

    @tagged("directions")
    def strips_at_scales(self, directions: Directions, key: Key, scales: Sequence[float], height: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, these rows of W + s Z for every s of ``scales``) for strips of a matrix that is not thin, bit for bit those of :meth:`at`.

        Z is drawn once for all of them, and W joined with its residual once; each strip is in the memory of the last.
        """
        flat, columns = self._flat(), self.shape[1]
        both = self.antithetic_pair(directions, key, scales) if height >= self.shape[0] else None
        if both is not None:
            yield slice(0, self.shape[0]), list(both)
            return
        unit = directions.scale(key, self.numel, self.device)
        largest = max(scales, key=abs)
        room = torch.empty(len(scales), height * columns, dtype=flat.dtype, device=flat.device)
        for top in range(0, self.shape[0], height):
            rows = slice(top, min(self.shape[0], top + height))
            whole = slice(top * columns, rows.stop * columns)
            strips = [strip[: whole.stop - whole.start] for strip in room]
            for_blocks(
                whole.stop, self.device, partial(self._together, directions, key, scales, largest, unit, flat, strips, whole), whole.start
            )
            yield rows, [strip.view(-1, columns) for strip in strips]

    @tagged("directions")
    def antithetic_pair(self, directions: Directions, key: Key, scales: Sequence[float], source: Any = None) -> Tensor | None:
        """W + s Z and W − s Z, (2, m, n), or the first alone, where a kernel makes them at once; ``source``: from where it reads the key,
        to be recorded."""
        flat = self._flat()
        fits = directions.dense and (len(scales) == 1 or (len(scales) == 2 and scales[0] == -scales[1]))
        kernel = perturb_kernels(flat, self.residual) if fits else None
        if kernel is None:
            return None
        found = torch.empty(len(scales), *self.shape, dtype=flat.dtype, device=flat.device)
        scale = scales[0] * directions.scale(key, self.numel, self.device)
        (kernel.perturb if len(scales) == 1 else kernel.perturb_pair)(directions, key, scale, flat, self.residual, found, source)
        return found

    def _together(
        self,
        directions: Directions,
        key: Key,
        scales: Sequence[float],
        largest: float,
        unit: float,
        flat: Tensor,
        strips: Sequence[Tensor],
        whole: slice,
        part: slice,
    ) -> None:
        move = directions.block(key, part, self.device, largest * unit)
        base = self._block(flat, part)
        here = slice(part.start - whole.start, part.stop - whole.start)
        # what needs a draw of its own comes last: it takes the place of ``move``
        for scale, strip in sorted(zip(scales, strips, strict=True), key=lambda pair: abs(pair[0]) != abs(largest)):
            if scale == largest:
                torch.add(base, move, out=strip[here])
            elif scale == -largest:
                torch.sub(base, move, out=strip[here])
            elif scale:
                torch.add(base, directions.block(key, part, self.device, scale * unit), out=strip[here])
            else:
                strip[here].copy_(base)

    @tagged("directions")
    def kernel_rows_at(self, directions: Directions, offset: Offset, rows: Tensor, source: Any = None) -> Tensor | None:
        """:meth:`rows_at` where a kernel makes them; ``source`` as in :meth:`antithetic_pair`."""
        weight = self.parameter.data
        kernel = perturb_kernels(weight, self.residual) if directions.dense and weight.is_contiguous() else None
        if kernel is None:
            return None
        scale = self.move_scale(directions, offset)
        found: Tensor = kernel.perturb_rows(directions, offset.key(self.name), scale, weight, self.residual, rows, source)
        return found

    @tagged("directions")
    def rows_at(self, directions: Directions, offset: Offset, rows: Tensor) -> Tensor:
        """Rows ``rows`` (int64, (R,)) of :meth:`at` for a matrix that is not thin, bit for bit, without the others."""
        found = self.kernel_rows_at(directions, offset, rows)
        if found is not None:
            return found
        key, columns = offset.key(self.name), self.shape[1]
        move = directions.rows(key, rows, columns).mul_(self.move_scale(directions, offset))
        return torch.add(self._rows(rows), move).to(self.parameter.dtype)

    @tagged("directions")
    def value(self) -> Tensor:
        flat = self._flat()
        return self._block(flat, slice(0, self.numel)).view(self.shape)

    @tagged("directions")
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        if value.data_ptr() == self.parameter.data_ptr():  # a float32 weight was handed out as it is and updated in place
            return
        flat, new = self._flat(), value.reshape(-1)
        key = Key(seed, step, 0, self.name, "rounding")
        keep = self.residual is not None  # storing uses up what it is given
        for_blocks(self.numel, self.device, lambda part: self._store(flat, part, new[part].clone() if keep else new[part], key))
        self._finish(flat)

    @tagged("directions")
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
        kernel = perturb_kernels(flat, self.residual) if directions.dense else None
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

    @tagged("directions")
    def add_product(self, left: Tensor, right: Tensor, seed: int, step: int, keep: float = 1.0) -> None:
        """W ← keep · W + left · rightᵀ for a matrix W (m, n), left (m, r), right (n, r): a block of rows at a time.

        Where W is away, when it comes back: the factors are kept as they are now.
        """
        layer = quantized_linear.owner_of(self.parameter)
        if layer is not None:
            layer.add(left, right, keep)
            return
        if placement.offload_handle(self.parameter) is not None:
            left, right = left.clone(), right.clone()
        work = partial(self._add_product, left, right, seed, step, keep)
        placement.when_loaded(self.parameter, work, held=4 * (left.numel() + right.numel()))

    @tagged("directions")
    def _add_product(self, left: Tensor, right: Tensor, seed: int, step: int, keep: float) -> None:
        columns = self.parameter.shape[1]
        rounding = Key(seed, step, 0, self.name, "rounding")
        kernel = low_rank_kernels(self.parameter.data, left.shape[1]) if self.parameter.is_contiguous() else None
        if kernel is not None:
            kernel.fold(self.parameter.data, self.residual, left.float(), right.float(), keep, rounding)
            return
        flat = self._flat()
        for rows in self._row_blocks():
            part = slice(rows.start * columns, rows.stop * columns)
            block = self._block(flat, part)
            block.view(-1, columns).addmm_(left[rows].to(block.dtype), right.T.to(block.dtype), beta=keep)
            self._store(flat, part, block, rounding)
        self._finish(flat)

    @tagged("directions")
    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """W + left · rightᵀ in W's dtype, a new tensor, made like :meth:`add_product`."""
        kernel = low_rank_kernels(self.parameter.data, left.shape[1]) if self.parameter.is_contiguous() else None
        if kernel is not None:
            return kernel.plus(self.parameter.data, self.residual, left.float().unsqueeze(0), right.float())[0]
        out = torch.empty(self.shape, dtype=self.parameter.dtype, device=self.device)
        for rows, block in self.product_strips(left, right):
            out[rows] = block
        return out

    @tagged("directions")
    def product_rows(self, left: Tensor, right: Tensor, rows: Tensor) -> Tensor:
        """Rows ``rows`` (int64, (R,)) of :meth:`plus_product`, without the others."""
        weight = self._rows(rows)
        return torch.addmm(weight, left[rows].to(weight.dtype), right.T.to(weight.dtype)).to(self.parameter.dtype)

    @tagged("directions")
    def product_strips(self, left: Tensor, right: Tensor, height: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(rows, these rows of :meth:`plus_product`) for strips of ``height`` rows."""
        flat, columns = self._flat(), self.shape[1]
        for rows in self._row_blocks(height):
            block = self._block(flat, slice(rows.start * columns, rows.stop * columns)).view(-1, columns)
            out = block if self.half else torch.empty_like(block)  # in half precision it is a copy
            yield rows, torch.addmm(block, left[rows].to(block.dtype), right.T.to(block.dtype), out=out).to(flat.dtype)
            del block, out  # before there is another

    def _row_blocks(self, height: int | None = None) -> Iterator[slice]:
        """Rows of a matrix, ``height`` or about as many at a time as a cache holds; an accelerator wants few, large launches."""
        rows, columns = self.parameter.shape
        height = height or max(1, (1 << 17 if self.device.type == "cpu" else 1 << 23) // columns)
        return (slice(top, min(rows, top + height)) for top in walked(range(0, rows, height)))

    @property
    def supports_multi_tensor(self) -> bool:  # type: ignore[override]
        return type(self) is FullCoordinate and not self.thin

    def stored_tensor(self) -> Tensor | None:
        return self.parameter.data if self.parameter.is_contiguous() else None

    @property
    def owned_tensor(self) -> Tensor | None:
        return self.residual if placement.offload_handle(self.parameter) is None else None

    def rebind(self, memory: Tensor) -> None:
        self.residual = memory

    def residual_tensor(self) -> Tensor:
        assert self.residual is not None
        return self.residual

    def reset(self) -> None:
        if self.residual is not None:
            placement.when_loaded(self.parameter, self.residual.zero_)

    def kept(self) -> list[Tensor]:
        return [] if self.residual is None else [self.residual]

    @property
    def supports_offload(self) -> bool:  # type: ignore[override]
        return type(self) is FullCoordinate

    @tagged("directions")
    def state(self) -> dict[str, Tensor]:
        return {} if self.residual is None else {"residual": alone(placement.snapshot(self.residual))}

    @tagged("directions")
    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        if self.residual is not None:
            residual, saved = self.residual, state["residual"]
            placement.when_loaded(self.parameter, lambda: residual.copy_(saved.to(self.device)), held=2 * self.numel)


def alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it is a part of another one: what is saved has memory of its own."""
    return tensor if tensor._base is None else tensor.clone()
