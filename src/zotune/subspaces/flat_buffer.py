"""Flat buffers: a model's small coordinates in one flat vector, drawn, evaluated and updated by few calls.

A call costs more than the elements of a bias do. So vectors and thin matrices of one kind (device, dtype of the stored θ, learning-rate
scale) share one vector of ``total`` elements: their directions are drawn together, (directions, total); their values at several points are
made a *run* of consecutive members at a time, which stays in a cache (:class:`BatchedValues`); their update under plain SGD is one sum.

Directions depend on a coordinate's own key and elements, and every sum is elementwise, so no result depends on the other members.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.rng.counter import PAGE
from zotune.rng.directions import GROUP, GROUPED_NUMEL, Directions, Key, add_weighted, group_of
from zotune.subspaces.coordinate import Coordinate, shrink
from zotune.weights.precision import HALF, join, split_into

#: Elements of a run, about; an accelerator wants few, large launches.
RUN = 1 << 14
ACCELERATOR_RUN = 1 << 18
#: Elements of the largest coordinate in a flat buffer on an accelerator: a page of words.
ACCELERATOR_NUMEL = 8 * PAGE
#: Elements that may be drawn a step ahead, while the device is busy.
AHEAD = 1 << 23
#: Elements drawn at a time, at most, unless a forward needs more at once: a step's memory beside the weights.
DRAWN = 1 << 19


def build_flat_buffers(coordinates: Sequence[Coordinate], drawn: int = DRAWN) -> list[FlatBuffer]:
    """Flat buffers of the small coordinates among these, one for each kind; drawing for one member then draws for all.

    ``drawn``: elements drawn at a time, at most, unless a forward needs more at once.
    """
    kinds: dict[tuple[torch.device, torch.dtype | None, float, bool], list[Coordinate]] = {}
    for coordinate in coordinates:
        most = GROUPED_NUMEL if coordinate.device.type == "cpu" else ACCELERATOR_NUMEL
        if coordinate.thin and coordinate.numel <= most and not coordinate.draws_separately:
            stored = coordinate.stored_tensor() if coordinate.schedule is None else None
            dtype = None if stored is None else stored.dtype
            kinds.setdefault((coordinate.device, dtype, coordinate.lr_scale, coordinate.owned_tensor is None), []).append(coordinate)
    return [FlatBuffer(members, drawn) for members in kinds.values()]


class FlatBuffer:
    """Small coordinates of one kind in one flat vector of ``total`` elements.

    Attributes:
        members: the coordinates, in the order of their places.
        stored: whether θ of all members can be read and written here.
        places: each member's slice of the flat vector, by name.
        runs: slices of consecutive members, about ``RUN`` elements each; ``run_of`` by name; ``members_of`` a run.
        owned: θ of all members, or its lower half where it is stored in half precision, if the members own it.
    """

    @tagged("directions")
    def __init__(self, members: Sequence[Coordinate], drawn: int = DRAWN) -> None:
        self.members = list(members)
        self.names = [c.name for c in members]
        self.numels = [c.numel for c in members]
        self.device = members[0].device
        self.lr_scale = members[0].lr_scale
        self.stored = members[0].stored_tensor() is not None and all(c.schedule is None for c in members)
        self.places: dict[str, slice] = {}
        self.runs: list[slice] = []
        self.run_of: dict[str, int] = {}
        self.members_of: list[list[Coordinate]] = []
        end, longest = 0, RUN if self.device.type == "cpu" else ACCELERATOR_RUN
        for coordinate in members:
            place = self.places[coordinate.name] = slice(end, end + coordinate.numel)
            end = place.stop
            if self.runs and end - self.runs[-1].start <= longest:
                self.runs[-1] = slice(self.runs[-1].start, end)
                self.members_of[-1].append(coordinate)
            else:
                self.runs.append(place)
                self.members_of.append([coordinate])
            self.run_of[coordinate.name] = len(self.runs) - 1
            coordinate.flat_buffer = self
        self.total = end
        self.owned: Tensor | None = None
        owned = [own for c in members if (own := c.owned_tensor) is not None] if self.stored else []
        if len(owned) == len(members):
            with torch.inference_mode(False):
                self.owned = torch.cat([own.view(-1) for own in owned])
            for coordinate in members:
                coordinate.rebind(self.owned[self.places[coordinate.name]])
        self._stored_cache: tuple[list[int], list[Tensor]] = [], []
        self.together = min(GROUP, max(1, drawn // end))  # directions drawn at a time
        self.drawn: tuple[Key, Tensor] | None = None
        self._ahead: tuple[Key, Tensor] | None = None
        self._asked = 0, 0
        self._sum: tuple[tuple[int, int, tuple[float, ...]], Tensor] | None = None
        self._released: set[str] = set()

    # -- directions -----------------------------------------------------------------------------------------------------------------

    @tagged("directions")
    def draw(self, directions: Directions, seed: int, step: int, first: int, count: int) -> Tensor:
        """Directions ``first`` to ``first + count - 1`` of all members, float32, (count, total); cached until :meth:`drop`."""
        if self.drawn is not None:
            cached, size = self.drawn[0], self.drawn[1].shape[0]
            start = first - cached.direction
            if (cached.seed, cached.step) == (seed, step) and start >= 0 and start + count <= size:
                return self.drawn[1][start : start + count]
        begin, size = (first, count) if count > 1 else group_of(first, 1)
        if count == 1 and size > self.together:
            begin, size = first, 1
        key = Key(seed, step, begin, self.names[0])
        self._released.clear()
        self._asked = begin, size
        self.drawn = None  # frees its memory before the next draw
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == key and len(ahead[1]) == size:
            self.drawn = ahead
        else:
            self.drawn = key, directions.draw_together(key, size, self.names, self.numels, self.device)
        return self.drawn[1][first - begin : first - begin + count]

    @tagged("directions")
    def prefetch(self, directions: Directions, seed: int, step: int) -> None:
        """Draw ahead the first directions of a coming step, assuming the pattern of the last one, if they are few."""
        begin, size = self._asked
        if 0 < size * self.total <= AHEAD:
            key = Key(seed, step, begin, self.names[0])
            self._ahead = key, directions.draw_together(key, size, self.names, self.numels, self.device)

    def caches(self, name: str) -> bool:
        """Whether directions are cached that ``name`` has not released."""
        return self.drawn is not None and name not in self._released

    def release(self, name: str) -> None:
        """``name`` needs the cached directions no longer; they are discarded once all members have released them."""
        self._released.add(name)
        if len(self._released) == len(self.members):
            self.drop()

    def drop(self) -> None:
        """Discard cached directions."""
        self.drawn = self._sum = None

    @tagged("gradients")
    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        """Σ_k weights[k] · Z_k of all members, float32, (total,); cached until :meth:`drop`, read-only."""
        which = (seed, step, tuple(weights))
        if self._sum is None or self._sum[0] != which:
            self._sum = which, self._add_weighted(torch.zeros(self.total, device=self.device), directions, weights, seed, step)
        return self._sum[1]

    @tagged("directions")
    def _add_weighted(self, total: Tensor, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        for first in range(0, len(weights), self.together):
            part = weights[first : first + self.together]
            if any(part):
                add_weighted(total, self.draw(directions, seed, step, first, len(part)), part)
        return total

    # -- θ --------------------------------------------------------------------------------------------------------------------------

    def _stored(self) -> list[Tensor]:
        """The members' stored tensors, flat."""
        places = [c.parameter.data_ptr() for c in self.members]
        if places != self._stored_cache[0]:
            self._stored_cache = places, [stored.view(-1) for c in self.members if (stored := c.stored_tensor()) is not None]
        return self._stored_cache[1]

    def _residuals(self) -> Tensor:
        return torch.cat([c.residual_tensor() for c in self.members]) if self.owned is None else self.owned

    @tagged("directions")
    def values(self) -> Tensor:
        """θ of all members, float32 (float64 where it is stored so), (total,); read-only."""
        if self.owned is not None and self.owned.is_floating_point():
            return self.owned
        value = torch.cat(self._stored())
        return join(value, self._residuals()) if value.dtype in HALF else value

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k for all members, bit for bit like each member's own."""
        if keep == 1.0 and not any(weights):
            return
        value = self.values()  # the members' own, or a new tensor
        if keep != 1.0 and any(c.anchored and c.decays_weights for c in self.members):
            for coordinate in self.members:
                shrink(value[self.places[coordinate.name]], keep, coordinate.anchor if coordinate.decays_weights else None)
        elif keep != 1.0:
            value.mul_(keep)
        self._add_weighted(value, directions, weights, seed, step)
        if value is not self.owned:
            stored = self._stored()
            if stored[0].dtype in HALF:
                half = torch.empty_like(value, dtype=stored[0].dtype)
                residual = torch.empty_like(value, dtype=torch.int16) if self.owned is None else self.owned
                split_into(value, half, residual)
                if self.owned is None:
                    torch._foreach_copy_([c.residual_tensor() for c in self.members], list(residual.split(self.numels)))
                value = half
            torch._foreach_copy_(stored, list(value.split(self.numels)))
        for coordinate in self.members:
            coordinate.mark_updated(keep, seed, step)


class BatchedValues:
    """θ + s Z of a flat buffer at several points of one evaluation: run by run, the last ``CACHED`` runs in memory.

    Args:
        buffer: of the members.
        z: their directions, (G, total).
        scales: s, (G, S).
        dtype: of the values.
    """

    CACHED = 2

    @tagged("directions")
    def __init__(self, buffer: FlatBuffer, z: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.flat_buffer, self.z, self.scales, self.dtype = buffer, z, scales, dtype
        self.base = buffer.values()
        self._runs: dict[int, dict[str, Tensor]] = {}

    def of(self, name: str) -> Tensor:
        """θ + s Z_g of one member, (G · S, numel)."""
        index = self.flat_buffer.run_of[name]
        values = self._runs.get(index)
        return (self._evaluate(index) if values is None else values)[name]

    @tagged("directions")
    def _evaluate(self, index: int) -> dict[str, Tensor]:
        """The values of a run, by member."""
        if len(self._runs) >= self.CACHED:
            del self._runs[next(iter(self._runs))]
        run, members = self.flat_buffer.runs[index], self.flat_buffer.members_of[index]
        moved = torch.addcmul(self.base[run], self.z[:, run].unsqueeze(1).to(self.base.dtype), self.scales.unsqueeze(2))
        parts = moved.flatten(0, 1).to(self.dtype).split([c.numel for c in members], dim=1)
        self._runs[index] = {c.name: part for c, part in zip(members, parts, strict=True)}
        return self._runs[index]
