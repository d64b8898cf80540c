"""Neighbors: a model's small coordinates side by side in one flat vector, drawn, shown and moved by few calls.

A call costs more than the numbers of a bias do. So vectors and thin matrices of one kind (same device, same dtype of what stores θ, same
learning-rate scale) share one flat vector of ``total`` numbers, in which each has its place:

- their directions are drawn together, (directions, total);
- their values at several points come a *run* of places at a time, about what a layer owns, which stays in a cache (see :class:`Shown`);
- their update under plain SGD is one sum over the flat vector.

Numbers belong to a coordinate's own key and to its elements, and every sum is made of elementwise products and additions, so nothing
depends on who the neighbors are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.rng.counter import PAGE
from zotune.rng.directions import GROUP, GROUPED_NUMEL, Directions, Key, add_weighted, group_of
from zotune.subspaces.coordinate import Coordinate, FlatBuffer
from zotune.weights.precision import HALF, join, split_into

#: About so many numbers to a run of places.
RUN = 1 << 14
#: On an accelerator, which wants few, large launches.
ACCELERATOR_RUN = 1 << 18
#: Numbers of the largest coordinate that is drawn together with others there: a page of words.
ACCELERATOR_NUMEL = 8 * PAGE
#: Numbers that may be drawn a step ahead, while the device is busy.
AHEAD = 1 << 23
#: No more numbers are drawn at a time than these, unless a forward wants more at once: they are what a step holds beside the weights.
DRAWN = 1 << 19


def draw_together(coordinates: Sequence[Coordinate]) -> list[Neighbors]:
    """From now on, whoever asks for a direction of one of the small coordinates among these draws it for all of its kind."""
    kinds: dict[tuple[torch.device, torch.dtype | None, float, bool], list[Coordinate]] = {}
    for coordinate in coordinates:
        most = GROUPED_NUMEL if coordinate.device.type == "cpu" else ACCELERATOR_NUMEL
        if coordinate.thin and coordinate.numel <= most and not coordinate.draws_alone:
            store = coordinate.store() if coordinate.turn is None else None
            dtype = None if store is None else store.dtype
            kinds.setdefault((coordinate.device, dtype, coordinate.lr_scale, coordinate.own_store is None), []).append(coordinate)
    return [Neighbors(members) for members in kinds.values()]


class Neighbors:
    """Small coordinates of one kind.

    Attributes:
        members: the coordinates, in the order of their places.
        places: where in the flat vector each lies, by name.
        runs: the places of consecutive members, about ``RUN`` numbers each; ``run_of`` by name; ``members_of`` a run.
    """

    @tagged("directions")
    def __init__(self, members: Sequence[Coordinate]) -> None:
        self.members = list(members)
        self.names = [c.name for c in members]
        self.numels = [c.numel for c in members]
        self.device = members[0].device
        self.lr_scale = members[0].lr_scale
        self.stored = members[0].store() is not None and all(c.turn is None for c in members)  # whether θ can be read and written here
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
            coordinate.neighbors = self
        self.total = end
        #: θ of all members, or where it is stored in half precision the lower half of it, if that is theirs to keep anywhere
        self.owned: Tensor | None = None
        owned = [own for c in members if (own := c.own_store) is not None] if self.stored else []
        if len(owned) == len(members):
            with torch.inference_mode(False):
                self.owned = torch.cat([own.view(-1) for own in owned])
            for coordinate in members:
                coordinate.rehouse(self.owned[self.places[coordinate.name]])
        self._kept_stores: tuple[list[int], list[Tensor]] = [], []
        self.together = min(GROUP, max(1, DRAWN // end))  # directions drawn at a time
        self.drawn: tuple[Key, Tensor] | None = None
        self._ahead: tuple[Key, Tensor] | None = None
        self._asked = 0, 0
        self._sum: tuple[tuple[int, int, tuple[float, ...]], Tensor] | None = None
        self._done: set[str] = set()  # who needs what is kept no longer

    # -- directions -----------------------------------------------------------------------------------------------------------------

    @tagged("directions")
    def many(self, directions: Directions, seed: int, step: int, first: int, count: int) -> Tensor:
        """Directions ``first`` to ``first + count - 1`` of all members, float32, (count, total); kept until :meth:`drop`."""
        if self.drawn is not None:
            kept, held = self.drawn[0], self.drawn[1].shape[0]
            start = first - kept.direction
            if (kept.seed, kept.step) == (seed, step) and start >= 0 and start + count <= held:
                return self.drawn[1][start : start + count]
        begin, size = (first, count) if count > 1 else group_of(first, 1)
        if count == 1 and size > self.together:
            begin, size = first, 1
        key = Key(seed, step, begin, self.names[0])
        self._done.clear()
        self._asked = begin, size
        self.drawn = None  # before the next ones take their memory
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == key and len(ahead[1]) == size:
            self.drawn = ahead
        else:
            self.drawn = key, directions.draw_together(key, size, self.names, self.numels, self.device)
        return self.drawn[1][first - begin : first - begin + count]

    @tagged("directions")
    def foresee(self, directions: Directions, seed: int, step: int) -> None:
        """Draw what a step to come will ask for first, if it asks for what the last one did and that is little."""
        begin, size = self._asked
        if 0 < size * self.total <= AHEAD:
            key = Key(seed, step, begin, self.names[0])
            self._ahead = key, directions.draw_together(key, size, self.names, self.numels, self.device)

    def holds(self, name: str) -> bool:
        """Whether directions are kept that ``name`` may still ask for."""
        return self.drawn is not None and name not in self._done

    def done(self, name: str) -> None:
        """``name`` needs the directions no longer; they are forgotten once all members have said so."""
        self._done.add(name)
        if len(self._done) == len(self.members):
            self.drop()

    def drop(self) -> None:
        """Forget the directions that are kept between a step's evaluations and its update."""
        self.drawn = self._sum = None

    @tagged("gradients")
    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        """Σ_k weights[k] · Z_k of all members, float32, (total,); kept until :meth:`drop`, and not to be changed."""
        which = (seed, step, tuple(weights))
        if self._sum is None or self._sum[0] != which:
            self._sum = which, self._add_weighted(torch.zeros(self.total, device=self.device), directions, weights, seed, step)
        return self._sum[1]

    @tagged("directions")
    def _add_weighted(self, total: Tensor, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        for first in range(0, len(weights), self.together):
            part = weights[first : first + self.together]
            if any(part):
                add_weighted(total, self.many(directions, seed, step, first, len(part)), part)
        return total

    # -- θ --------------------------------------------------------------------------------------------------------------------------

    def _stores(self) -> list[Tensor]:
        """The members' stores, flat."""
        places = [c.parameter.data_ptr() for c in self.members]
        if places != self._kept_stores[0]:
            self._kept_stores = places, [store.view(-1) for c in self.members if (store := c.store()) is not None]
        return self._kept_stores[1]

    def _residuals(self) -> Tensor:
        return torch.cat([c.store_residual() for c in self.members]) if self.owned is None else self.owned

    @tagged("directions")
    def values(self) -> Tensor:
        """θ of all members, float32 (float64 where it is stored so), (total,); not to be changed."""
        if self.owned is not None and self.owned.is_floating_point():
            return self.owned
        value = torch.cat(self._stores())
        return join(value, self._residuals()) if value.dtype in HALF else value

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        """θ ← keep · θ + Σ_k weights[k] · Z_k for all members, bit for bit as each would alone."""
        if keep == 1.0 and not any(weights):
            return
        value = self.values()  # the members' own, or a tensor that nobody else has
        if keep != 1.0:
            value.mul_(keep)
        self._add_weighted(value, directions, weights, seed, step)
        if value is not self.owned:
            stores = self._stores()
            if stores[0].dtype in HALF:
                half = torch.empty_like(value, dtype=stores[0].dtype)
                residual = torch.empty_like(value, dtype=torch.int16) if self.owned is None else self.owned
                split_into(value, half, residual)
                if self.owned is None:
                    torch._foreach_copy_([c.store_residual() for c in self.members], list(residual.split(self.numels)))
                value = half
            torch._foreach_copy_(stores, list(value.split(self.numels)))
        for coordinate in self.members:
            coordinate.descended(keep, seed, step)


class Shown:
    """Values of neighbors at several points at once, for one evaluation: run by run, the last few kept.

    Args:
        neighbors: whose values.
        z: their directions, (G, total).
        scales: (G, S).
        dtype: of the values.
    """

    KEPT = 2

    @tagged("directions")
    def __init__(self, neighbors: FlatBuffer, z: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.neighbors, self.z, self.scales, self.dtype = neighbors, z, scales, dtype
        self.base = neighbors.values()
        self._runs: dict[int, dict[str, Tensor]] = {}

    @tagged("directions")
    def of(self, name: str) -> Tensor:
        """θ + s Z_g of one member, (G · S, numel)."""
        neighbors = self.neighbors
        index = neighbors.run_of[name]
        values = self._runs.get(index)
        if values is None:
            if len(self._runs) >= self.KEPT:
                del self._runs[next(iter(self._runs))]
            run, members = neighbors.runs[index], neighbors.members_of[index]
            moved = torch.addcmul(self.base[run], self.z[:, run].unsqueeze(1).to(self.base.dtype), self.scales.unsqueeze(2))
            parts = moved.flatten(0, 1).to(self.dtype).split([c.numel for c in members], dim=1)
            values = self._runs[index] = {c.name: part for c, part in zip(members, parts, strict=True)}
        return values[name]
