"""The traffic of a step between workers, in bytes and seconds, beside that of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Bytes of a loss on the wire, and of each of the other numbers that go with a worker's losses: a count of sequences, a digest in two.
LOSS, OTHERS = 4, 3


def sent(points: int, examples: int, workers: int) -> int:
    """Bytes that the busiest worker sends per step: its block of the table of losses, P · N / W of them, and the others."""
    return LOSS * (points * math.ceil(examples / workers) + OTHERS)


def received(points: int, examples: int, workers: int) -> int:
    """Bytes that every worker receives per step: everybody's blocks."""
    return (workers - 1) * sent(points, examples, workers)


def gradients(weights: int, workers: int, width: int = 2) -> float:
    """Bytes that a worker sends, and receives, in the ring all-reduce of so many gradients of ``width`` bytes: 2 (W − 1) / W of them."""
    return 2 * (workers - 1) / workers * weights * width


@dataclass(frozen=True)
class Network:
    """A link of every worker: bytes a second, and seconds that a message takes however short it is."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, size: float, workers: int) -> float:
        """An exchange in which ``size`` bytes pass each link, in a tree of log₂ W hops."""
        return 0.0 if workers < 2 else math.ceil(math.log2(workers)) * self.latency + size / self.bandwidth
