"""Full space: every element of a parameter is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.execution import walked
from zotune.io.memory_tags import tagged
from zotune.kernels import low_rank_kernels, perturb_kernels
from zotune.rng.directions import Directions, Key, for_blocks
from zotune.subspaces.coordinate import Coordinate, Offset, is_thin, matching, shrink, unshared
from zotune.subspaces.matrix_view import factor_strips, matrix_view, plus_product
from zotune.subspaces.several_scales import perturb_at_scales
from zotune.weights import placement, quantized_linear
from zotune.weights.precision import HALF, join, split_into, stochastic_round


class FullCoordinate(Coordinate):
    """θ = W. The update of a half-precision W is rounded stochastically, keyed by the step (see ``precision``), unless W has a residual: it
    is then the upper part of a float32 value, the residual the lower 16 bits, and no update is rounded away. Thin weights have residuals
    always: those are small, and a vector of numbers near 1 has a coarse spacing.

    One class, though long: the ways of perturbing W (whole, strips, rows, by a kernel) agree bit for bit because they share its block code.

    Attributes:
        start, stop: the elements of the parameter, flat, that this process stores.
        columns: of its matrices (see ``matrix_view``).
    """

    #: Whether this process stores only some of the elements.
    sharded = False

    @tagged("directions")
    def __init__(self, name: str, parameter: nn.Parameter, *, keep_residual: bool | None = None) -> None:
        """``keep_residual``: whether a half-precision W has a residual; None: if it is thin."""
        super().__init__(name, parameter, parameter.shape)
        self.start, self.stop = 0, self.numel
        self.thin = is_thin(parameter.shape)
        view = matrix_view(parameter.shape)
        self.columns = self.numel if view is None else view.columns
        self.half = parameter.dtype in HALF
        self.residual: Tensor | None = None
        if self.thin if keep_residual is None else keep_residual:
            self.use_residual()

    @tagged("directions")
    def use_residual(self) -> None:
        if not self.half or self.residual is not None:
            return
        self.residual = torch.zeros(self.stop - self.start, dtype=torch.int16, device=self.device)
        handle = placement.offload_handle(self.parameter)
        if handle is not None:
            handle.attach(self.residual)

    # -- elements of θ --------------------------------------------------------------------------------------------------------------

    def _flat(self) -> Tensor:
        """The stored elements of W; a copy where W is not contiguous."""
        data = self.parameter.data
        return data.view(-1) if data.is_contiguous() else data.reshape(-1)

    def _block(self, flat: Tensor, part: slice) -> Tensor:
        """A block of θ in float32 (a view where the weight is float32; float64 weights stay float64)."""
        if not self.half:
            return flat[part]
        return flat[part].float() if self.residual is None else join(flat[part], self.residual[part])

    def _rows(self, rows: Tensor) -> Tensor:
        """Rows of a matrix θ, like :meth:`_block`."""
        weight = self.parameter.detach()[rows]
        if not self.half:
            return weight
        return weight.float() if self.residual is None else join(weight, self.residual.view(self.shape)[rows])

    def _write(self, flat: Tensor, part: slice, block: Tensor, key: Key) -> None:
        """Write ``block`` (flat, contiguous; its memory may be reused) to a block of θ."""
        if not self.half:
            if block.data_ptr() != flat[part].data_ptr():
                flat[part] = block
        elif self.residual is None:
            flat[part] = stochastic_round(block, flat.dtype, key, self.start + part.start)
        else:
            split_into(block, flat[part], self.residual[part])

    def _finish(self, flat: Tensor) -> None:
        """Copy :meth:`_flat` back where it is a copy."""
        if not self.parameter.data.is_contiguous():
            self.parameter.data.copy_(flat.view(self.shape))

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        return self.half and self.residual is None

    def _rounding(self, seed: int, step: int) -> Key:
        return rounding_key(seed, step, self.name)

    def _for_blocks(self, work: Callable[[slice, slice], None]) -> None:
        """Call ``work(part, here)`` for every block: its elements of the parameter, and of what this process stores."""
        for_blocks(self.stop, self.device, lambda part: work(part, self._here(part)), self.start)

    def _here(self, part: slice) -> slice:
        return slice(part.start - self.start, part.stop - self.start)

    def _strips(self, height: int) -> Iterator[tuple[slice, slice]]:
        """(rows, their elements) of a matrix, ``height`` rows at a time."""
        columns = self.columns
        bottom = self.stop // columns
        for top in walked(range(self.start // columns, bottom, height)):
            rows = slice(top, min(bottom, top + height))
            yield rows, slice(rows.start * columns, rows.stop * columns)

    def _product_height(self) -> int:
        """Rows of a product at a time: what a cache holds, or few, large launches on an accelerator."""
        few = self.sharded or self.device.type == "cpu"
        return max(1, (1 << 17 if few else 1 << 23) // self.columns)

    def _perturb_kernels(self, directions: Directions, flat: Tensor) -> Any:
        return perturb_kernels(flat) if directions.dense and not self.sharded else None

    def _low_rank_kernels(self, left: Tensor) -> Any:
        fits = self.parameter.is_contiguous() and not self.sharded and left.dim() == 2 == self.parameter.dim()
        return low_rank_kernels(self.parameter.data, left.shape[1]) if fits else None

    # -- W + s Z --------------------------------------------------------------------------------------------------------------------

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
        """The factor of the direction's elements at ``offset``."""
        return offset.scale * directions.scale(offset.key(self.name), self.numel, self.device)

    def _perturb(self, directions: Directions, offset: Offset, flat: Tensor, out: Tensor, whole: slice, scale: float) -> None:
        """Write elements ``whole`` of the perturbed weight to ``out``."""
        key = offset.key(self.name)
        kernels = self._perturb_kernels(directions, flat)
        if kernels is not None and out.numel() == self.numel:
            kernels.perturb(directions, key, scale, flat, self.residual, out)
            return

        def perturb(part: slice) -> None:
            move = directions.block(key, part, self.device, scale)
            target = out[part.start - whole.start : part.stop - whole.start]
            if self.half:
                target.copy_(move.add_(self._block(flat, self._here(part))))
            else:
                torch.add(flat[self._here(part)], move, out=target)

        for_blocks(whole.stop, self.device, perturb, whole.start)

    @tagged("directions")
    def strips_at(self, directions: Directions, offset: Offset, height: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, these rows of :meth:`at`) for strips of ``height`` rows of a matrix that is not thin; all strips share memory."""
        flat, columns = self._flat(), self.shape[1]
        scale = self.move_scale(directions, offset)
        buffer = torch.empty(height * columns, dtype=flat.dtype, device=flat.device)
        for rows, part in self._strips(height):
            strip = buffer[: part.stop - part.start]
            self._perturb(directions, offset, flat, strip, part, scale)
            yield rows, strip.view(-1, columns)

    @tagged("directions")
    def strips_at_scales(
        self, directions: Directions, key: Key, scales: Sequence[float], height: int
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, these rows of W + s Z for every s of ``scales``) for strips of a matrix that is not thin, bit for bit those of :meth:`at`.

        Z is drawn once for all scales, and W joined with its residual once; all strips share memory.
        """
        flat, columns = self._flat(), self.shape[1]
        pair = self.antithetic_pair(directions, key, scales) if height >= self.shape[0] else None
        if pair is not None:
            yield slice(0, self.shape[0]), list(pair)
            return
        unit = directions.scale(key, self.numel, self.device)
        buffers = torch.empty(len(scales), height * columns, dtype=flat.dtype, device=flat.device)
        for rows, part in self._strips(height):
            strips = [buffer[: part.stop - part.start] for buffer in buffers]
            perturb_at_scales(directions, key, scales, unit, partial(self._block, flat), self.device, strips, part)
            yield rows, [strip.view(-1, columns) for strip in strips]

    @tagged("directions")
    def antithetic_pair(self, directions: Directions, key: Key, scales: Sequence[float], source: Any = None) -> Tensor | None:
        """W + s Z and W − s Z, (2, m, n), or the first alone, where a kernel makes them at once, else None.

        ``source``: device memory of the key, for a CUDA graph.
        """
        flat = self._flat()
        fits = len(scales) == 1 or (len(scales) == 2 and scales[0] == -scales[1])
        kernels = self._perturb_kernels(directions, flat) if fits else None
        if kernels is None:
            return None
        out = torch.empty(len(scales), *self.shape, dtype=flat.dtype, device=flat.device)
        scale = scales[0] * directions.scale(key, self.numel, self.device)
        (kernels.perturb if len(scales) == 1 else kernels.perturb_pair)(directions, key, scale, flat, self.residual, out, source)
        return out

    @tagged("directions")
    def kernel_rows_at(self, directions: Directions, offset: Offset, rows: Tensor, source: Any = None) -> Tensor | None:
        """:meth:`rows_at` where a kernel makes them, else None; ``source`` as in :meth:`antithetic_pair`."""
        weight = self.parameter.data
        kernels = self._perturb_kernels(directions, weight) if weight.is_contiguous() else None
        if kernels is None:
            return None
        scale = self.move_scale(directions, offset)
        found: Tensor = kernels.perturb_rows(directions, offset.key(self.name), scale, weight, self.residual, rows, source)
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

    # -- θ and its update -----------------------------------------------------------------------------------------------------------

    @tagged("directions")
    def value(self) -> Tensor:
        flat = self._flat()
        return self._block(flat, slice(0, self.numel)).view(self.shape)

    @tagged("directions")
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        if value.data_ptr() == self.parameter.data_ptr():  # a float32 weight itself, updated in place
            return
        flat, new = self._flat(), value.reshape(-1)
        key = self._rounding(seed, step)
        copies = self.residual is not None  # splitting overwrites its input
        self._for_blocks(lambda _, here: self._write(flat, here, new[here].clone() if copies else new[here], key))
        self._finish(flat)

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        if keep == 1.0 and not any(weights):
            return
        flat = self._flat()
        rounding = self._rounding(seed, step)
        if self.thin:
            whole = slice(0, self.numel)
            block = shrink(self._block(flat, whole), keep, self.anchor)
            self._add_weighted(block, directions, weights, seed, step)
            self._write(flat, whole, block, rounding)
            self._finish(flat)
            return
        keys = [(Key(seed, step, direction, self.name), weight) for direction, weight in enumerate(weights) if weight]
        moves = [(key, weight * directions.scale(key, self.numel, self.device)) for key, weight in keys]
        kernels = self._perturb_kernels(directions, flat)
        if kernels is not None and moves and (len(moves) == 1 or not self.rounds) and (keep == 1.0 or self.anchor is None):
            for place, (key, scale) in enumerate(moves):
                kernels.update(directions, key, scale, flat, self.residual, 1.0 if place else keep, rounding)
            self._finish(flat)
            return

        def move(part: slice, here: slice) -> None:
            block = shrink(self._block(flat, here), keep, None if self.anchor is None else self.anchor[here])
            directions.add_to(block, part, moves)
            self._write(flat, here, block, rounding)

        self._for_blocks(move)
        self._finish(flat)

    # -- products -------------------------------------------------------------------------------------------------------------------

    @tagged("directions")
    def add_product(self, left: Tensor, right: Tensor, seed: int, step: int, keep: float = 1.0) -> None:
        """W ← keep · W + left · rightᵀ for a matrix W (m, n), left (m, r), right (n, r), a block of rows at a time.

        For a stack of E matrices (see ``matrix_view``) left is (E, m, r) and right (E, n, r).
        An offloaded W is written when it is next loaded, from copies of the factors.
        """
        layer = quantized_linear.owner_of(self.parameter)
        if layer is not None:
            layer.add(left, right, keep, anchored=self.anchored)
            return
        if placement.offload_handle(self.parameter) is not None:
            left, right = left.clone(), right.clone()
        work = partial(self._add_product, left, right, seed, step, keep)
        placement.when_loaded(self.parameter, work, 4 * (left.numel() + right.numel()))

    @tagged("directions")
    def _add_product(self, left: Tensor, right: Tensor, seed: int, step: int, keep: float) -> None:
        rounding = self._rounding(seed, step)
        kernels = self._low_rank_kernels(left)
        anchored = self.anchor is not None and keep != 1.0
        if kernels is not None and not anchored:
            kernels.fold(self.parameter.data, self.residual, left.float(), right.float(), keep, rounding)
            return
        flat = self._flat()
        for _, part, some, others in factor_strips(left, right, self._product_height(), self._strips):
            here = self._here(part)
            block = self._block(flat, here)
            if self.anchor is not None:
                shrink(block, keep, self.anchor[here])
            plus_product(block, some, others, 1.0 if anchored else keep)
            self._write(flat, here, block, rounding)
        self._finish(flat)

    @tagged("directions")
    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """W + left · rightᵀ in W's dtype, a new tensor, computed like :meth:`add_product`."""
        kernels = self._low_rank_kernels(left)
        if kernels is not None:
            return kernels.add_low_rank(self.parameter.data, self.residual, left.float().unsqueeze(0), right.float())[0]
        out = torch.empty(self.shape, dtype=self.parameter.dtype, device=self.device)
        flat = out.view(-1, right.shape[-2])
        for rows, block in self.product_strips(left, right):
            flat[rows] = block
        return out

    @tagged("directions")
    def product_rows(self, left: Tensor, right: Tensor, rows: Tensor) -> Tensor:
        """Rows ``rows`` (int64, (R,)) of :meth:`plus_product`, without the others."""
        weight = self._rows(rows)
        return torch.addmm(weight, left[rows].to(weight.dtype), right.T.to(weight.dtype)).to(self.parameter.dtype)

    @tagged("directions")
    def product_strips(self, left: Tensor, right: Tensor, height: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(rows, these rows of :meth:`plus_product`) for strips of ``height`` rows."""
        flat, columns = self._flat(), right.shape[-2]
        for rows, part, some, others in factor_strips(left, right, height or self._product_height(), self._strips):
            block = self._block(flat, part)
            out = block if self.half else torch.empty_like(block)  # in half precision the block is a copy
            yield rows, plus_product(block, some, others, out=out).view(-1, columns).to(flat.dtype)
            del block, out  # freed before the next strip

    # -- storage --------------------------------------------------------------------------------------------------------------------

    @property
    def supports_multi_tensor(self) -> bool:  # type: ignore[override]
        return type(self) is FullCoordinate and not self.thin

    @property
    def supports_offload(self) -> bool:  # type: ignore[override]
        return type(self) is FullCoordinate

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

    def kept(self) -> list[Tensor]:
        return [] if self.residual is None else [self.residual]

    def reset(self) -> None:
        if self.residual is not None:
            placement.when_loaded(self.parameter, self.residual.zero_)

    @tagged("directions")
    def state(self) -> dict[str, Tensor]:
        return {} if self.residual is None else {"residual": unshared(placement.snapshot(self.residual))}

    @tagged("directions")
    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        if ("residual" in state) != (self.residual is not None):
            raise ValueError(f"{self.name} was saved with another rounding; resume with the method's option rounding as it was.")
        if self.residual is not None:
            residual, saved = self.residual, matching(state["residual"], self.residual, self.name)
            placement.when_loaded(self.parameter, lambda: residual.copy_(saved.to(self.device)), 2 * self.numel)


def rounding_key(seed: int, step: int, name: str) -> Key:
    """The key of a step's stochastic rounding of a weight."""
    return Key(seed, step, 0, name, "rounding")
