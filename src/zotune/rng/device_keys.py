"""Keys that a recorded forward reads from the device, where another step's are put before it is replayed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zotune.rng.counter import Key, page_words, signed, stream
from zotune.rng.directions import Directions
from zotune.rng.tables import scaled_magnitudes, scaled_signs
from zotune.rng.transfer import send_list

#: Streams that there is room for: matrices × directions.
ROOM = 1 << 14


class Source(NamedTuple):
    """Where a recorded launch reads what is different every step: page words (PAGE,), a stream's beginning (1,); and its table."""

    base: Tensor
    origin: Tensor
    table: Tensor


class Keys:
    """The streams of one step's directions, held where they are for the next step's.

    Args:
        directions: the distribution, whose tables are kept with the keys.
        seed: of the run.
        step: the first one.
        device: where they are held.
    """

    def __init__(self, directions: Directions, seed: int, step: int, device: torch.device) -> None:
        self.directions, self.device = directions, device
        self.seed, self.step = seed, step
        self._base = page_words(seed, step, device).clone()
        self._origins = torch.zeros(ROOM, dtype=torch.int64, device=device)
        self._places: dict[tuple[str, int], int] = {}
        self._tables: dict[float, Tensor] = {}

    def source(self, name: str, direction: int, scale: float) -> Source:
        """Where the stream of a parameter's direction is read, and a table for this scale."""
        place = self._places.get((name, direction))
        if place is None:
            place = self._places[name, direction] = len(self._places)
            assert place < ROOM
            self._origins[place : place + 1].copy_(send_list([self._origin(name, direction)], self.device))
        if scale not in self._tables:
            self._tables[scale] = table_of(self.directions, scale, self.device)
        return Source(self._base, self._origins[place : place + 1], self._tables[scale])

    def renew(self, seed: int, step: int) -> None:
        """Hold another step's."""
        self.seed, self.step = seed, step
        self._base.copy_(page_words(seed, step, self.device))
        found = [self._origin(name, direction) for name, direction in self._places]
        self._origins[: len(found)].copy_(send_list(found, self.device))

    def _origin(self, name: str, direction: int) -> int:
        return signed(stream(Key(self.seed, self.step, direction, name)))


def table_of(directions: Directions, scale: float, device: torch.device) -> Tensor:
    """What a kernel looks the numbers of a distribution up in, times ``scale``."""
    return scaled_signs(scale, device) if directions.source.per_word == 64 else scaled_magnitudes(scale, device)
