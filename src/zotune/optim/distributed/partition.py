"""The split of a step among workers: pure functions of numbers that every worker knows.

A step evaluates P points on N examples; its losses are a table (P, N). The table is cut into one block a worker: a grid of p ranges of
points by d ranges of examples.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

#: What is split: a step's examples, its directions, both, or whatever leaves no worker idle.
MODES = ("auto", "data", "directions", "both")
#: Whether all workers pass the same batch, of which each evaluates its share, or each its own.
BATCHES = ("auto", "same", "own")


class Block(NamedTuple):
    """What one worker evaluates: some points, on some columns of the table."""

    points: range
    columns: range

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.points) * len(self.columns)


def grid(points: int, columns: int, workers: int, mode: str) -> tuple[int, int]:
    """(p, d), ranges of points and of examples, p · d = ``workers``.

    ``"data"`` splits the examples, ``"directions"`` the points. ``"auto"`` splits the examples as far as they go, and the points where
    there are fewer examples than workers (a loss that is one number per batch). ``"both"`` splits the points as far as they go, but
    not into one range per worker where there are several examples.
    """
    if mode == "data":
        return 1, workers
    if mode == "directions":
        return workers, 1
    divisors = [d for d in range(1, workers + 1) if workers % d == 0]
    if mode == "auto":
        d = max(d for d in divisors if d <= max(1, columns))
        return workers // d, d
    p = max(p for p in divisors if p <= points and (p < workers or workers == 1 or columns < 2))
    return p, workers // p


def blocks(points: int, columns: int, workers: int, mode: str, edges: Sequence[int] | None = None) -> list[Block]:
    """The block of every worker, in the order of their ranks.

    Args:
        edges: where columns may be cut, rising from 0 to ``columns``; ignored where that would leave a worker idle.

    Example:
        >>> blocks(2, 8, 2, "data")
        [Block(points=range(0, 2), columns=range(0, 4)), Block(points=range(0, 2), columns=range(4, 8))]
    """
    p, d = grid(points, columns, workers, mode)
    rows = cut(points, p)
    if edges is not None and len(edges) > d:
        places = [edges[(len(edges) - 1) * i // d] for i in range(d + 1)]
        ranges = [range(start, stop) for start, stop in itertools.pairwise(places)]
    else:
        ranges = cut(columns, d)
    return [Block(row, column) for row in rows for column in ranges]


def cut(count: int, ways: int) -> list[range]:
    """``range(count)`` in so many neighboring ranges of as equal length as can be."""
    return [range(count * i // ways, count * (i + 1) // ways) for i in range(ways)]


def pieces(widths: Sequence[int], columns: range) -> list[tuple[int, int, int]]:
    """The pieces (part, start, stop) of parts of these widths, one behind the other, that a range of columns covers."""
    ends = list(itertools.accumulate(widths))
    found, at = [], columns.start
    while at < columns.stop:
        part = bisect.bisect_right(ends, at)
        begin = ends[part] - widths[part]
        stop = min(columns.stop, ends[part])
        found.append((part, at - begin, stop - begin))
        at = stop
    return found
