"""Parameters of which every process stores some rows: DTensors, as FSDP2's ``fully_shard`` and ``distribute_tensor`` make them.

Directions belong to elements, so each process draws, perturbs and updates those of its own rows. The perturbed rows of all processes are
gathered for a layer's forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.full import FullCoordinate


class ShardedCoordinate(FullCoordinate):
    """θ = W, of which this process stores the elements ``start`` to ``stop``: whole rows.

    Raises:
        ValueError: the parameter is not split by rows over one dimension of processes.
    """

    sharded = True
    draws_separately = True

    def __init__(self, name: str, parameter: nn.Parameter, *, keep_residual: bool | None = None) -> None:
        super().__init__(name, parameter, keep_residual=False)
        keep = self.thin if keep_residual is None else keep_residual
        self.thin = False
        tensor: Any = parameter
        placements = tensor.placements
        if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
            raise ValueError(
                f"{name} is sharded as {placements}; shard it by rows (dimension 0) over one dimension of the mesh, as FSDP2 does."
            )
        if not placements[0].is_replicate():
            rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
            height = -(-rows // tensor.device_mesh.size())
            rank = tensor.device_mesh.get_local_rank()
            self.start, self.stop = (min(rows, height * at) * columns for at in (rank, rank + 1))
        if keep:
            self.use_residual()
        assert self._flat().numel() == self.stop - self.start, f"{name} has {self._flat().numel()} elements here"

    def _flat(self) -> Tensor:
        tensor: Any = self.parameter.detach()
        return tensor.to_local().view(-1)

    def _finish(self, flat: Tensor) -> None:
        """Nothing: :meth:`_flat` is a view."""

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        """The whole weight, gathered from the perturbed rows of all processes: a collective call."""
        flat = self._flat()
        if offset is None:
            return self._gathered(flat)
        out = torch.empty_like(flat)
        self._perturb(directions, offset, flat, out, slice(self.start, self.stop), self.move_scale(directions, offset))
        return self._gathered(out)

    def _gathered(self, flat: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        tensor: Any = self.parameter
        local = flat.view(-1, *self.shape[1:])
        whole = DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
        return whole.full_tensor()

    @tagged("directions")
    def value(self) -> Tensor:
        """θ's rows here, flat."""
        flat = self._flat()
        return self._block(flat, slice(0, flat.numel()))

    @tagged("directions")
    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        flat = self._flat()
        top, bottom = self.start // self.shape[1], self.stop // self.shape[1]
        block = self._block(flat, slice(0, flat.numel())).view(-1, self.shape[1])
        return self._gathered(torch.addmm(block, left[top:bottom].to(block.dtype), right.T.to(block.dtype)).to(flat.dtype))

    def stored_tensor(self) -> Tensor | None:
        return None
