"""BatchContext: what a batched evaluation lends modules, and what it makes for all of them once: directions, values, products that layers share.

With ``hold`` the same context serves several evaluations, which read their directions and keys where they lie (see ``captured``).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zotune.errors import NotBatchableError
from zotune.forward.batches import BatchLayout
from zotune.io.memory_tags import tagged
from zotune.rng.device_keys import Keys, Source
from zotune.rng.directions import Directions, Key
from zotune.rng.transfer import send_list
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.flat_buffer import BatchedValues, FlatBuffer


class BatchContext:
    """The stacked parameters of one evaluation; with ``hold`` of several, which read their directions in the same memory."""

    def __init__(
        self,
        stack: BatchLayout,
        directions: Directions,
        siblings: Mapping[str, Sequence[LowRankCoordinate]] | None = None,
        hold: bool = False,
    ) -> None:
        self.stack, self.hold = stack, hold
        self._held: dict[int, tuple[Coordinate | FlatBuffer, Tensor]] = {}
        self._keys: Keys | None = None
        self.siblings = siblings or {}  # by name: layers that may be given the same input, this one among them
        self._input: tuple[weakref.ref[Tensor] | None, int] = None, 0
        self._thin: dict[str, Tensor] = {}
        self.directions = directions
        self.blocks = stack.blocks
        self.total = stack.total
        self.lead = stack.total  # rows of the input now; a model may flatten answer options into them
        self.first = min(stack.directions)
        self.count = max(stack.directions) - self.first + 1
        self.in_order = stack.directions == tuple(range(self.first, self.first + self.count))
        self.lent: dict[str, Tensor] = {}  # batched parameters, by name
        self._shown: dict[tuple[int, torch.dtype], BatchedValues] = {}
        self._scales: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}

    def end(self) -> None:
        """Let go of everything: what is lent and who lends it know each other, and would be kept until Python looks for such circles."""
        self.lent.clear()
        self._shown.clear()
        self._thin.clear()

    @tagged("directions")
    def z(self, coordinate: Coordinate) -> Tensor:
        """The groups' directions, (G, *shape); of low-rank coordinates what their moving factor moves by, (G, rows, r)."""
        z = self._own_z(coordinate)
        return coordinate.expand(z) if isinstance(coordinate, LowRankCoordinate) else z

    @tagged("directions")
    def _own_z(self, coordinate: Coordinate) -> Tensor:
        """The groups' directions, (G, *shape)."""
        z = self._drawn(coordinate)
        if coordinate.schedule is not None:
            moves = [float(coordinate.is_active(self.stack.step, direction)) for direction in self.stack.directions]
            z = z * send_list(moves, z.device).view(-1, *[1] * (z.dim() - 1))
        return z

    @tagged("directions")
    def _drawn(self, whose: Coordinate | FlatBuffer) -> Tensor:
        if id(whose) in self._held:
            return self._held[id(whose)][1]
        z = self._by_group(whose.draw(self.directions, self.stack.seed, self.stack.step, self.first, self.count))
        if self.hold:
            self._held[id(whose)] = whose, z.clone()
            return self._held[id(whose)][1]
        return z

    @tagged("directions")
    def renew(self, stack: BatchLayout) -> None:
        """Bring the directions of another step, of a stack that is cut up alike, to where the last ones are held."""
        self.stack = stack
        for whose, z in self._held.values():
            z.copy_(self._by_group(whose.draw(self.directions, stack.seed, stack.step, self.first, self.count)))
        if self._keys is not None:
            self._keys.renew(stack.seed, stack.step)

    @tagged("directions")
    def both(self, coordinate: FullCoordinate, direction: int, scales: Sequence[float]) -> Tensor:
        """The two weights of a large matrix in full space, from a key that is held."""
        key = Key(self.stack.seed, self.stack.step, direction, coordinate.name)
        source = self._source(coordinate, direction, scales[0])
        found = coordinate.antithetic_pair(self.directions, key, scales, source)
        if found is None:
            raise NotBatchableError(f"nothing makes the weights of {coordinate.name} from a key that is held")
        return found

    @tagged("directions")
    def rows(self, coordinate: FullCoordinate, offset: Offset | None, ids: Tensor) -> Tensor:
        """Rows of a large table in full space, likewise."""
        if offset is None:
            return F.embedding(ids, coordinate.parameter.detach())
        source = self._source(coordinate, offset.direction, offset.scale)
        found = coordinate.kernel_rows_at(self.directions, offset, ids.reshape(-1).long(), source)
        if found is None:
            raise NotBatchableError(f"nothing makes the rows of {coordinate.name} from a key that is held")
        return found.view(*ids.shape, -1)

    def _source(self, coordinate: FullCoordinate, direction: int, scale: float) -> Source:
        if self._keys is None:
            self._keys = Keys(self.directions, self.stack.seed, self.stack.step, coordinate.device)
        return self._keys.source(coordinate.name, direction, scale)

    def _by_group(self, z: Tensor) -> Tensor:
        if not self.in_order:
            z = z.index_select(0, send_list(self.stack.directions, z.device) - self.first)
        return z

    @tagged("directions")
    def values(self, coordinate: Coordinate, dtype: torch.dtype) -> Tensor:
        """θ + s Z_g of every block in ``dtype``, (B, *shape)."""
        buffer = coordinate.flat_buffer
        if buffer is not None and buffer.stored:
            shown = self._shown.get((id(buffer), dtype))
            if shown is None:
                z = self._drawn(buffer)
                shown = self._shown[id(buffer), dtype] = BatchedValues(buffer, z, self.scales(z, 0), dtype)
            return shown.of(coordinate.name).view(self.blocks, *coordinate.shape)
        z, value = self._own_z(coordinate), coordinate.value()
        return torch.addcmul(value, z.unsqueeze(1).to(value.dtype), self.scales(value, z.dim() - 1)).flatten(0, 1).to(dtype)

    @tagged("activations")
    def thin(self, coordinate: LowRankCoordinate, x: Tensor) -> Tensor:
        """x V, (B, q, r), for x (..., n). What siblings will ask of the same input comes along, for it costs no more than the one does."""
        known, version = self._input
        if known is None or known() is not x or x.is_inference() or x._version != version or coordinate.name not in self._thin:
            flat = x.reshape(-1, x.shape[-1])
            siblings = self.siblings.get(coordinate.name, (coordinate,))
            rows = [sibling.v.T for sibling in siblings]  # r contiguous rows each
            v = rows[0] if len(rows) == 1 else torch.cat(rows)
            product = torch.mm(v if v.dtype == x.dtype else v.to(x.dtype), flat.T).view(-1, self.blocks, flat.shape[0] // self.blocks)
            parts = product.permute(1, 2, 0).split([len(some) for some in rows], dim=2)
            self._thin = {sibling.name: part for sibling, part in zip(siblings, parts, strict=True)}
            self._input = weakref.ref(x), 0 if x.is_inference() else x._version
        return self._thin[coordinate.name]

    @tagged("directions")
    def scales(self, like: Tensor, dims: int) -> Tensor:
        """The scales (G, S) with ``dims`` dimensions of size 1 behind."""
        key = like.dtype, like.device, dims
        if key not in self._scales:
            scales = send_list(self.stack.scales, like.device, like.dtype)
            self._scales[key] = scales.view(*scales.shape, *[1] * dims)
        return self._scales[key]

    @tagged("activations")
    def spread(self, x: Tensor, dims: int) -> Tensor:
        """``x`` with stacked rows in front of its last ``dims`` dimensions: as it is, or expanded where all rows share it."""
        if x.dim() > dims:
            if x.shape[0] % self.total == 0:
                return x
            if x.shape[0] == 1 and x.dim() > dims + 1:  # positions (1, T), the same for every row
                return x.expand(self.lead, *x.shape[1:])
        raise NotBatchableError(f"an input of shape {tuple(x.shape)} does not consist of the batch's rows")
