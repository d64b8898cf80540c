"""Parameters of which every process holds some rows: DTensors, as FSDP2's ``fully_shard`` and ``distribute_tensor`` make them.

A direction's numbers belong to elements, so a process draws those of its own rows, whichever they are: it perturbs and updates these alone,
and the perturbed rows of all processes are put together for the length of a layer's forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, for_blocks
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.full import FullCoordinate
from zotune.weights.precision import stochastic_round


class ShardedCoordinate(FullCoordinate):
    """θ = W, of which the rows from ``start`` to ``stop`` (elements, laid out flat) are here.

    Raises:
        ValueError: the parameter is split in another way than by rows over one dimension of processes.
    """

    sharded = True
    draws_separately = True

    def __init__(self, name: str, parameter: nn.Parameter, *, keep_residual: bool = True) -> None:
        super().__init__(name, parameter, keep_residual=False)
        self.thin = False
        tensor: Any = parameter
        placements = tensor.placements
        if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
            raise ValueError(
                f"{name} is sharded as {placements}; shard it by rows (dimension 0) over one dimension of the mesh, as FSDP2 does."
            )
        rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
        if placements[0].is_replicate():
            self.start, self.stop = 0, self.numel
        else:
            height = -(-rows // tensor.device_mesh.size())
            place = tensor.device_mesh.get_local_rank()
            self.start, self.stop = (min(rows, height * at) * columns for at in (place, place + 1))
        if self.half and keep_residual:
            self.residual = torch.zeros(self.stop - self.start, dtype=torch.int16, device=parameter.device)
        assert self._flat().numel() == self.stop - self.start, f"{name} has {self._flat().numel()} numbers here"

    def _flat(self) -> Tensor:
        tensor: Any = self.parameter.detach()
        return tensor.to_local().view(-1)

    def _finish(self, flat: Tensor) -> None:
        """Nothing: what is changed is what is stored."""

    def _each(self, work: Callable[[slice, slice], None]) -> None:
        """Call ``work(part, here)`` for every block: its place in the whole parameter, and among what is held here."""
        for_blocks(self.stop, self.device, lambda part: work(part, slice(part.start - self.start, part.stop - self.start)), self.start)

    def _store(self, flat: Tensor, part: slice, block: Tensor, key: Key) -> None:
        if self.half and self.residual is None:
            flat[part] = stochastic_round(block, flat.dtype, key, self.start + part.start)
        else:
            super()._store(flat, part, block, key)

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        """The whole weight, from the rows that every process has perturbed; all of them have to ask for it."""
        flat = self._flat()
        if offset is None:
            return self._whole(flat)
        key, scale, out = offset.key(self.name), self.move_scale(directions, offset), torch.empty_like(flat)

        def perturb(part: slice, here: slice) -> None:
            out[here] = directions.block(key, part, self.device, scale).add_(self._block(flat, here))

        self._each(perturb)
        return self._whole(out)

    def _whole(self, flat: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        tensor: Any = self.parameter
        local = flat.view(-1, *self.shape[1:])
        whole = DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
        return whole.full_tensor()

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        keys = [(Key(seed, step, direction, self.name), weight) for direction, weight in enumerate(weights) if weight]
        if keep == 1.0 and not keys:
            return
        moves = [(key, weight * directions.scale(key, self.numel, self.device)) for key, weight in keys]
        flat, rounding = self._flat(), Key(seed, step, 0, self.name, "rounding")

        def move(part: slice, here: slice) -> None:
            block = self._block(flat, here)
            if keep != 1.0:
                block = block.mul_(keep)
            directions.add_to(block, part, moves)
            self._store(flat, here, block, rounding)

        self._each(move)

    @tagged("directions")
    def value(self) -> Tensor:
        """θ's rows here, flat."""
        flat = self._flat()
        return self._block(flat, slice(0, flat.numel()))

    @tagged("directions")
    def add_product(self, left: Tensor, right: Tensor, seed: int, step: int, keep: float = 1.0) -> None:
        columns, flat = self.shape[1], self._flat()
        rounding = Key(seed, step, 0, self.name, "rounding")
        height = max(1, (1 << 17) // columns)
        for top in range(self.start // columns, self.stop // columns, height):
            rows = slice(top, min(self.stop // columns, top + height))
            here = slice(rows.start * columns - self.start, rows.stop * columns - self.start)
            block = self._block(flat, here)
            block.view(-1, columns).addmm_(left[rows].to(block.dtype), right.T.to(block.dtype), beta=keep)
            self._store(flat, here, block, rounding)

    @tagged("directions")
    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        flat = self._flat()
        top, bottom = self.start // self.shape[1], self.stop // self.shape[1]
        block = self._block(flat, slice(0, flat.numel())).view(-1, self.shape[1])
        return self._whole(torch.addmm(block, left[top:bottom].to(block.dtype), right.T.to(block.dtype)).to(flat.dtype))

    def stored_tensor(self) -> Tensor | None:
        return None
