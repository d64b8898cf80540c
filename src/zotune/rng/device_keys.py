"""Keys in device memory, from which a captured forward reads them; each step's keys are written there before a replay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zotune.rng.counter import Key, page_words, signed, stream
from zotune.rng.directions import Directions
from zotune.rng.tables import scaled_magnitudes, scaled_signs
from zotune.rng.transfer import send_list

#: Streams at most: matrices × directions.
CAPACITY = 1 << 14


class KeySource(NamedTuple):
    """Inputs of a captured launch: the step's page words (PAGE,), the stream's origin (1,), both in device memory, and the table."""

    base: Tensor
    origin: Tensor
    table: Tensor


class DeviceKeys:
    """The streams of a step's directions, at addresses that stay the same for later steps.

    Args:
        directions: the distribution, whose tables are kept with the keys.
        seed: of the run.
        step: the first one.
        device: of the memory.
    """

    def __init__(self, directions: Directions, seed: int, step: int, device: torch.device) -> None:
        self.directions, self.device = directions, device
        self.seed, self.step = seed, step
        self._base = page_words(seed, step, device).clone()
        self._origins = torch.zeros(CAPACITY, dtype=torch.int64, device=device)
        self._places: dict[tuple[str, int], int] = {}
        self._tables: dict[float, Tensor] = {}

    def source(self, name: str, direction: int, scale: float) -> KeySource:
        """The stream of a parameter's direction and the table for this scale."""
        place = self._places.get((name, direction))
        if place is None:
            place = self._places[name, direction] = len(self._places)
            assert place < CAPACITY
            self._origins[place : place + 1].copy_(send_list([self._origin(name, direction)], self.device))
        if scale not in self._tables:
            self._tables[scale] = lookup_table(self.directions, scale, self.device)
        return KeySource(self._base, self._origins[place : place + 1], self._tables[scale])

    def advance(self, seed: int, step: int) -> None:
        """Write the keys of another step."""
        self.seed, self.step = seed, step
        self._base.copy_(page_words(seed, step, self.device))
        origins = [self._origin(name, direction) for name, direction in self._places]
        self._origins[: len(origins)].copy_(send_list(origins, self.device))

    def _origin(self, name: str, direction: int) -> int:
        return signed(stream(Key(self.seed, self.step, direction, name)))


def lookup_table(directions: Directions, scale: float, device: torch.device) -> Tensor:
    """A kernel's lookup table of a distribution, times ``scale``."""
    return scaled_signs(scale, device) if directions.source.per_word == 64 else scaled_magnitudes(scale, device)
