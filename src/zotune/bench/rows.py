"""The rows of a report: for each place of the grid its chosen cell and the results of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zotune.baselines import Baseline, catalog
from zotune.bench.grid import Grid
from zotune.bench.plan import Cell, Place, runs_of
from zotune.bench.results import FINAL
from zotune.bench.selection import Finder, best_of, test_score


@dataclass(frozen=True)
class Row:
    """A place of the grid with its chosen cell.

    Attributes:
        place: its labels.
        cells: all its cells.
        best: the chosen one; None until then.
        results: of the chosen cell's runs so far.
        seeds: number of its runs.
    """

    place: Place
    cells: Sequence[Cell]
    best: Cell | None
    results: Sequence[Mapping[str, Any]]
    seeds: int

    @property
    def done(self) -> list[Mapping[str, Any]]:
        """The results of runs that ended well."""
        return [result for result in self.results if result["status"] == "done"]

    @property
    def complete(self) -> bool:
        """Whether the cell is chosen and all its runs are done or diverged."""
        return self.best is not None and len(self.results) == self.seeds and all(result["status"] in FINAL for result in self.results)

    @property
    def scores(self) -> list[float]:
        """The main metric on the test examples, one per seed."""
        return [score for result in self.done if (score := test_score(result)) is not None]

    @property
    def metric(self) -> str | None:
        return self.done[0]["summary"]["metric"] if self.done else None

    @property
    def backward(self) -> bool:
        """Whether the method uses backprop."""
        return self._kind == "backward"

    @property
    def zeroth_order(self) -> bool:
        return self._kind == "zeroth order"

    @property
    def _kind(self) -> str:
        name = str(self.cells[0].options["method"])
        baseline = catalog.get(name) if catalog.is_baseline(name) else None
        return baseline.kind if isinstance(baseline, Baseline) else "zeroth order"

    def mean(self, *keys: str) -> float | None:
        """Mean over the runs of a figure in their summaries, such as ("memory", "training")."""
        values: list[Any] = [result["summary"] for result in self.done]
        for key in keys:
            values = [value[key] for value in values]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def per_step(self, clock: str) -> float | None:
        """Mean seconds per step by a clock of the history: "seconds" or "processor_seconds"."""
        times = []
        for result in self.done:
            last: Mapping[str, Any] = next((entry for entry in reversed(result["history"]) if clock in entry), {})
            if last.get("timed_steps"):
                times.append(last[clock] / last["timed_steps"])
        return statistics.fmean(times) if times else None


def rows_of(grid: Grid, places: Mapping[Place, Sequence[Cell]], find: Finder) -> list[Row]:
    """A row for every place, in the grid's order."""
    rows = []
    for place, cells in places.items():
        best = best_of(cells, grid.tune_seeds, find)
        found = [] if best is None else [find(run) for run in runs_of(best, grid.seeds)]
        rows.append(Row(place, cells, best, [result for result in found if result is not None], len(grid.seeds)))
    return rows


def score_text(row: Row) -> str:
    """A row's test score, such as `84.4 ± 1.2`, with the number of runs that diverged."""
    diverged = sum(result["status"] == "diverged" for result in row.results)
    if not row.scores:
        return "diverged" if diverged else "–"
    return percent(row.scores, row.metric) + (f" ({diverged} of {row.seeds} diverged)" if diverged else "")


def percent(values: Sequence[float], metric: str | None) -> str:
    """Mean ± standard deviation over seeds, such as `84.4 ± 1.2`; in percent except for a loss."""
    factor = 1.0 if metric == "loss" else 100.0
    scaled = [factor * value for value in values]
    if not scaled:
        return "–"
    mean = f"{statistics.fmean(scaled):.1f}" if factor != 1.0 else f"{statistics.fmean(scaled):.3f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled):.1f}"
