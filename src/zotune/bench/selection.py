"""The runs that a grid still needs, and a method's chosen cell: the best on held-out examples, never on test examples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zotune.bench.plan import Cell, Place, Run, runs_of

Finder = Callable[[Run], dict[str, Any] | None]


def held_out(result: Mapping[str, Any]) -> tuple[float, float]:
    """(metric, −loss) on the held-out examples, larger is better; −∞ for a run without a result."""
    if result["status"] != "done" or not result["summary"].get("held_out"):
        return -math.inf, -math.inf
    summary = result["summary"]
    metrics, name = summary["held_out"], summary["metric"]
    value, loss = (metrics.get(key) for key in (name, "loss"))
    sign = -1.0 if name == "loss" else 1.0
    return -math.inf if value is None else sign * value, -math.inf if loss is None else -loss


def test_score(result: Mapping[str, Any]) -> float | None:
    """The main metric on the test examples, or None."""
    if result["status"] != "done" or not result["summary"]["after"]:
        return None
    return result["summary"]["after"][result["summary"]["metric"]]


def best_of(cells: Sequence[Cell], tune_seeds: Sequence[int], find: Finder) -> Cell | None:
    """The cell with the best mean over the tuning seeds; ties go to the lower held-out loss, then to the first.

    None while a tuning run is missing or has failed (divergence is a result).
    """
    if len(cells) == 1:
        return cells[0]
    scores = []
    for cell in cells:
        results = [find(run) for run in runs_of(cell, tune_seeds)]
        if any(result is None or result["status"] == "failed" for result in results):
            return None
        pairs = [held_out(result) for result in results if result is not None]
        scores.append(tuple(statistics.fmean(values) for values in zip(*pairs, strict=True)))
    return cells[scores.index(max(scores))]


def due(places: Mapping[Place, Sequence[Cell]], seeds: Sequence[int], tune_seeds: Sequence[int], find: Finder) -> list[Run]:
    """The runs known so far: the tuning runs of each place, and its best cell under all seeds once it is chosen."""
    wanted: dict[str, Run] = {}
    for cells in places.values():
        if len(cells) > 1:
            wanted |= {run.key: run for cell in cells for run in runs_of(cell, tune_seeds)}
    for cells in places.values():
        best = best_of(cells, tune_seeds, find)
        if best is not None:
            wanted |= {run.key: run for run in runs_of(best, seeds)}
    return list(wanted.values())


def total(places: Mapping[Place, Sequence[Cell]], seeds: Sequence[int], tune_seeds: Sequence[int]) -> int:
    """The number of runs of a grid in the end; the best cell's tuning runs count once."""
    more = len(set(seeds) - set(tune_seeds))
    return sum(len(seeds) if len(cells) == 1 else len(cells) * len(tune_seeds) + more for cells in places.values())
