"""The context of a batched evaluation: directions, values of vectors and input projections, computed once for all layers.

With ``persistent`` one context serves several evaluations, whose directions and keys stay at the same addresses (see ``cuda_graphs``).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.errors import NotBatchableError
from zotune.forward.batches import BatchLayout
from zotune.io.memory_tags import tagged
from zotune.rng.device_keys import DeviceKeys, KeySource
from zotune.rng.directions import Directions, Key
from zotune.rng.transfer import send_list
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, CoordinateBuffer, Offset
from zotune.subspaces.flat_buffer import BatchedValues, FlatBuffer


class BatchContext:
    """State shared by the batched parameters of one evaluation, or of several.

    Args:
        layout: of the rows; G groups, S scales, B = G · S blocks.
        directions: the distribution of Z.
        siblings: by name, layers that may get the same input, the layer itself included.
        persistent: directions keep their memory, for :meth:`advance`.
    """

    def __init__(
        self,
        layout: BatchLayout,
        directions: Directions,
        siblings: Mapping[str, Sequence[LowRankCoordinate]] | None = None,
        persistent: bool = False,
    ) -> None:
        self.layout, self.directions, self.siblings, self.persistent = layout, directions, siblings or {}, persistent
        self.blocks = layout.blocks
        self.total = layout.total
        self.input_rows = layout.total  # of the current input; a model may flatten answer options into the rows
        self.parameters: dict[str, Tensor] = {}  # batched parameters, by name
        self.reader: nn.Module | None = None  # the last module that read one
        self.block: int | None = None  # that a module called block by block evaluates
        self.keeps = False  # values for the calls that follow, as while text is generated
        self._first = min(layout.directions)
        self._count = max(layout.directions) - self._first + 1
        self._consecutive = layout.directions == tuple(range(self._first, self._first + self._count))
        self._z: dict[int, tuple[Coordinate | FlatBuffer, Tensor]] = {}  # where persistent
        self._keys: DeviceKeys | None = None
        self._values: dict[tuple[int, torch.dtype], BatchedValues] = {}
        self._scales: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
        self._input: tuple[weakref.ref[Tensor] | None, int] = None, 0
        self._projections: dict[str, Tensor] = {}
        self._kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def narrow(self, rows: int) -> None:
        """From now on inputs have ``rows`` rows, or multiples: equally many of each block, as where some texts have ended."""
        assert rows % self.blocks == 0, (rows, self.blocks)
        self.total = self.input_rows = rows

    def clear(self) -> None:
        """Release all tensors: the context and its parameters refer to each other, and would live until a garbage collection."""
        self.parameters.clear()
        self._values.clear()
        self._projections.clear()
        self._kept.clear()

    # -- directions -----------------------------------------------------------------------------------------------------------------

    @tagged("directions")
    def expanded_z(self, coordinate: LowRankCoordinate) -> Tensor:
        """The groups' directions of the trained factor, (G, rows of A, r)."""
        return coordinate.expand(self.group_z(coordinate))

    def group_z(self, coordinate: Coordinate) -> Tensor:
        """The groups' directions, (G, *shape)."""
        z = self._draw(coordinate)
        if coordinate.schedule is not None:
            active = [float(coordinate.is_active(self.layout.step, direction)) for direction in self.layout.directions]
            z = z * send_list(active, z.device).view(-1, *[1] * (z.dim() - 1))
        return z

    def _draw(self, of: Coordinate | FlatBuffer) -> Tensor:
        if id(of) in self._z:
            return self._z[id(of)][1]
        z = self._draw_groups(of)
        if self.persistent or self.keeps:
            z = z.clone()
            self._z[id(of)] = of, z
        return z

    def _draw_groups(self, of: Coordinate | FlatBuffer) -> Tensor:
        z = of.draw(self.directions, self.layout.seed, self.layout.step, self._first, self._count)
        return z if self._consecutive else z.index_select(0, send_list(self.layout.directions, z.device) - self._first)

    @tagged("directions")
    def advance(self, layout: BatchLayout) -> None:
        """Write the directions of another step, of a layout of the same shape, over those of the last one."""
        self.layout = layout
        for of, z in self._z.values():
            z.copy_(self._draw_groups(of))
        if self._keys is not None:
            self._keys.advance(layout.seed, layout.step)

    def _source(self, coordinate: FullCoordinate, direction: int, scale: float) -> KeySource:
        if self._keys is None:
            self._keys = DeviceKeys(self.directions, self.layout.seed, self.layout.step, coordinate.device)
        return self._keys.source(coordinate.name, direction, scale)

    @tagged("directions")
    def perturbed_weights(self, coordinate: FullCoordinate, direction: int, scales: Sequence[float]) -> Tensor:
        """A large full-space matrix at one direction, (S, m, n), from a key in device memory."""
        key = Key(self.layout.seed, self.layout.step, direction, coordinate.name)
        weights = coordinate.antithetic_pair(self.directions, key, scales, self._source(coordinate, direction, scales[0]))
        if weights is None:
            raise NotBatchableError(f"no kernel perturbs {coordinate.name} from a key in device memory")
        return weights

    @tagged("directions")
    def perturbed_rows(self, coordinate: FullCoordinate, offset: Offset | None, ids: Tensor) -> Tensor:
        """Rows of a large full-space table, (*ids, n), from a key in device memory."""
        if offset is None:
            return F.embedding(ids, coordinate.parameter.detach())
        source = self._source(coordinate, offset.direction, offset.scale)
        rows = coordinate.kernel_rows_at(self.directions, offset, ids.reshape(-1).long(), source)
        if rows is None:
            raise NotBatchableError(f"no kernel perturbs rows of {coordinate.name} from a key in device memory")
        return rows.view(*ids.shape, -1)

    def offsets(self, coordinate: Coordinate) -> list[Offset | None]:
        """The offset of each block; None: θ."""
        layout = self.layout
        return [
            Offset(scale, layout.seed, layout.step, direction) if scale and coordinate.is_active(layout.step, direction) else None
            for direction, scales in zip(layout.directions, layout.scales, strict=True)
            for scale in scales
        ]

    # -- values ---------------------------------------------------------------------------------------------------------------------

    def scales(self, like: Tensor, dims: int) -> Tensor:
        """The scales (G, S, 1, ...) with ``dims`` trailing dimensions of size 1, in the dtype and on the device of ``like``."""
        key = like.dtype, like.device, dims
        if key not in self._scales:
            scales = send_list(self.layout.scales, like.device, like.dtype)
            self._scales[key] = scales.view(*scales.shape, *[1] * dims)
        return self._scales[key]

    def values(self, coordinate: Coordinate, dtype: torch.dtype) -> Tensor:
        """θ + s Z_g of every block in ``dtype``, (B, *shape)."""
        if not self.keeps:
            return self._computed_values(coordinate, dtype)
        key = id(coordinate), dtype
        if key not in self._kept:
            self._kept[key] = self._computed_values(coordinate, dtype)
        return self._kept[key]

    def _computed_values(self, coordinate: Coordinate, dtype: torch.dtype) -> Tensor:
        buffer = coordinate.flat_buffer
        if buffer is None or not buffer.stored:
            return self._own_values(coordinate, dtype)
        values = self._values.get((id(buffer), dtype)) or self._buffer_values(buffer, dtype)
        return values.of(coordinate.name).view(self.blocks, *coordinate.shape)

    @tagged("directions")
    def _buffer_values(self, buffer: CoordinateBuffer, dtype: torch.dtype) -> BatchedValues:
        assert isinstance(buffer, FlatBuffer)
        z = self._draw(buffer)
        values = self._values[id(buffer), dtype] = BatchedValues(buffer, z, self.scales(z, 0), dtype)
        return values

    @tagged("directions")
    def _own_values(self, coordinate: Coordinate, dtype: torch.dtype) -> Tensor:
        z, value = self.group_z(coordinate), coordinate.value()
        return torch.addcmul(value, z.unsqueeze(1).to(value.dtype), self.scales(value, z.dim() - 1)).flatten(0, 1).to(dtype)

    # -- inputs ---------------------------------------------------------------------------------------------------------------------

    def project(self, coordinate: LowRankCoordinate, x: Tensor) -> Tensor:
        """x V, (B, q, r), for x (..., n); the siblings' products with the same input are computed along with it."""
        cached, version = self._input
        if cached is None or cached() is not x or x.is_inference() or x._version != version or coordinate.name not in self._projections:
            flat = x.reshape(-1, x.shape[-1])
            siblings = self.siblings.get(coordinate.name, (coordinate,))
            rows = [sibling.v.T for sibling in siblings]  # r contiguous rows each
            v = rows[0] if len(rows) == 1 else torch.cat(rows)
            product = torch.mm(v if v.dtype == x.dtype else v.to(x.dtype), flat.T).view(-1, self.blocks, flat.shape[0] // self.blocks)
            parts = product.permute(1, 2, 0).split([len(some) for some in rows], dim=2)
            self._projections = {sibling.name: part for sibling, part in zip(siblings, parts, strict=True)}
            self._input = weakref.ref(x), 0 if x.is_inference() else x._version
        return self._projections[coordinate.name]

    def expand_rows(self, x: Tensor, dims: int) -> Tensor:
        """``x`` with the layout's rows before its last ``dims`` dimensions: unchanged, or expanded where all rows share it.

        Raises:
            NotBatchableError: its rows are not those of the layout.
        """
        if x.dim() > dims:
            if x.shape[0] % self.total == 0:
                return x
            if x.shape[0] == 1 and x.dim() > dims + 1:  # positions (1, T), the same for every row
                return x.expand(self.input_rows, *x.shape[1:])
        raise NotBatchableError(f"an input of shape {tuple(x.shape)} does not consist of the batch's rows")

    def by_block(self, x: Tensor, size: int) -> Tensor:
        """x (..., n) as (B, q, n), for a vector of ``size`` = n elements.

        Raises:
            NotBatchableError: the sizes differ.
        """
        if x.shape[-1] != size:
            raise NotBatchableError(f"a vector of {size} elements meets rows of {x.shape[-1]}")
        return self.expand_rows(x, 1).reshape(self.blocks, -1, size)
