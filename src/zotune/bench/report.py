"""The report of a bench: `report.md` with its figures, self-contained `report.html`, and `table.json` for programs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zotune.bench import figures
from zotune.bench.document import Block, Figure, Heading, Paragraph, Table, markdown, page
from zotune.bench.grid import Grid
from zotune.bench.plan import Cell, Place, runs_of, spelled
from zotune.bench.rows import Row, percent, rows_of, score_text
from zotune.bench.selection import Finder, held_out
from zotune.io.atomic import write_text
from zotune.io.figures import stacked_bars, svg_text
from zotune.io.json_files import write_json
from zotune.io.text import duration_text

FIGURES = "figures"


def write(grid: Grid, places: Mapping[Place, Sequence[Cell]], find: Finder, folder: Path) -> list[Path]:
    """Writes the report of all results so far to ``folder`` and returns its files."""
    rows = rows_of(grid, places, find)
    blocks = [
        *([Paragraph(grid.about)] if grid.about else []),
        *_state(grid, rows, find),
        *_scores(grid, rows),
        *_against_backprop(grid, rows),
        *_curves(grid, rows),
        *_memory(grid, rows),
        *_time(grid, rows),
        *_tried(grid, rows, find),
        *_how(grid, rows),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            write_text(folder / FIGURES / f"{block.name}.svg", block.svg)
    write_text(folder / "report.md", markdown(grid.title, blocks, FIGURES))
    write_text(folder / "report.html", page(grid.title, blocks))
    write_json(folder / "table.json", {"rows": [_plain(row) for row in rows]})
    return [folder / "report.md", folder / "report.html"]


def _plain(row: Row) -> dict[str, object]:
    """The figures of a row that do not depend on the machine's speed."""
    return {
        **{axis: getattr(row.place, axis) for axis in ("model", "task", "scheme", "method")},
        "chosen": None if row.best is None else dict(row.best.tried),
        "metric": row.metric,
        "scores": row.scores,
        "held_out": [held_out(result)[0] for result in row.done],
        "steps": row.mean("steps"),
        "forward_passes": row.mean("forward_passes"),
        "sequences": row.mean("sequences_evaluated"),
    }


# -- sections -----------------------------------------------------------------------------------------------------------------------


def _state(grid: Grid, rows: Sequence[Row], find: Finder) -> list[Block]:
    open_rows = [row for row in rows if not row.complete]
    if not open_rows:
        return []
    said = []
    for row in open_rows:
        runs = [run for cell in row.cells for run in runs_of(cell, grid.tune_seeds if len(row.cells) > 1 else grid.seeds)]
        reasons = [result["reason"] for run in runs if (result := find(run)) is not None and result["status"] == "failed"]
        said.append((*_labels(grid, row), reasons[0] if reasons else f"{len(row.results)} of {row.seeds} runs are done"))
    return [Paragraph("This report is not complete; these rows lack runs:"), Table((*_axes(grid), "why"), said)]


def _scores(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    """Mean ± standard deviation on the test examples, above published figures."""
    names = sorted({row.metric for row in rows if row.metric}) or ["accuracy"]
    spread = f", mean ± standard deviation over {len(grid.seeds)} seeds" if len(grid.seeds) > 1 else ""
    what = f"Test {', '.join(names)} in percent{spread}"
    chosen = "; hyperparameters were chosen on held-out training examples" if any(len(row.cells) > 1 for row in rows) else ""
    blocks: list[Block] = [Heading("Scores"), Paragraph(f"{what}{chosen}.")]
    over_schemes = len(grid.tasks) == 1 and len(grid.schemes) > 1
    for model in grid.models:
        published = [each for each in grid.published if each.model == model.label and each.what == "score"]
        columns = [each.label for each in (grid.schemes if over_schemes else grid.tasks)]
        here = [row for row in rows if row.place.model == model.label]
        if not here:
            continue
        lines: list[tuple[str, ...]] = []
        emphasis: set[int] = set()
        keys = dict.fromkeys(_line_key(row.place.method, row.place.scheme, over_schemes) for row in here)
        keys |= dict.fromkeys(_line_key(m, s, over_schemes) for each in published for _, s, m in each.values)
        for method, scheme in keys:
            label = method if not scheme or len(grid.schemes) == 1 else f"{method}, {scheme}"
            ours = {
                row.place.scheme if over_schemes else row.place.task: score_text(row)
                for row in here
                if _line_key(row.place.method, row.place.scheme, over_schemes) == (method, scheme)
            }
            if ours:
                lines.append((label, *(ours.get(column, "") for column in columns)))
            for number, each in enumerate(published, 1):
                theirs = {
                    s if over_schemes else t: f"{value:g}"
                    for (t, s, m), value in each.values.items()
                    if _line_key(m, s, over_schemes) == (method, scheme)
                }
                if theirs:
                    emphasis.add(len(lines))
                    lines.append((f"{label}, published [{number}]", *(theirs.get(column, "") for column in columns)))
        if len(grid.models) > 1:
            blocks.append(Heading(model.label, 3))
        blocks.append(Table(("method", *columns), lines, frozenset(emphasis)))
        if published:
            blocks.append(Paragraph("; ".join(f"[{number}] {each.source}" for number, each in enumerate(published, 1)) + "."))
    return blocks


def _line_key(method: str, scheme: str, over_schemes: bool) -> tuple[str, str]:
    return (method, "") if over_schemes else (method, scheme)


def _against_backprop(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    """Zeroth order against first order: score, memory, time."""
    lines = []
    for row in rows:
        if not (row.zeroth_order and row.scores):
            continue
        others = [
            each
            for each in rows
            if each.backward and each.scores and (each.place.model, each.place.task) == (row.place.model, row.place.task)
        ]
        same = [each for each in others if each.place.scheme == row.place.scheme] or others
        if not same:
            continue
        baseline = max(same, key=lambda each: statistics.fmean(held_out(result)[0] for result in each.done))
        gap = 100 * (statistics.fmean(row.scores) - statistics.fmean(baseline.scores))
        against = baseline.place.method + ("" if baseline.place.scheme == row.place.scheme else f", {baseline.place.scheme}")
        lines.append(
            (
                *_labels(grid, row),
                against,
                f"{gap:+.1f}".replace("-", "−"),
                _ratio(row.mean("memory", "training"), baseline.mean("memory", "training")),
                _ratio(_beyond(row), _beyond(baseline)),
                _ratio(row.per_step("processor_seconds"), baseline.per_step("processor_seconds")),
                _ratio(_whole_time(row), _whole_time(baseline)),
            )
        )
    if not lines:
        return []
    header = (*_axes(grid), "against", "score, points", "peak memory", "beyond the model", "time per step", "time of the run")
    text = (
        "Of the first-order methods of the same model, task and scheme the one with the best held-out score; ratios of memory and "
        "processor time, ours over theirs."
    )
    return [Heading("Against backprop"), Paragraph(text), Table(header, lines)]


def _curves(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = []
    for model in grid.models:
        for task in grid.tasks:
            here = [row for row in rows if (row.place.model, row.place.task) == (model.label, task.label) and row.metric]
            series: dict[str, list[Any]] = {_line(grid, row): [] for row in rows}  # of all rows, so that a method's color is one
            for row in here:
                series[_line(grid, row)] = [result["history"] for result in row.done]
            cuda = any(result["summary"]["memory"]["of"].startswith("CUDA") for row in here for result in row.done)
            axes = (*figures.AXES[:2], figures.GPU_SECONDS) if cuda else figures.AXES
            name = f"curves_{_file_name(model.label)}_{_file_name(task.label)}"
            held = any(result["summary"].get("held_out") for row in here for result in row.done)
            metric = f"{'held-out' if held else 'test'} {here[0].metric}" if here else ""
            svg = figures.curves(series, here[0].metric or "", metric, name, axes=axes) if here else None
            if svg is not None:
                caption = f"{model.label} on {task.label}: score and training loss in training, means over seeds, bands their range"
                blocks.append(Figure(name, caption, svg))
    return [Heading("Learning curves"), *blocks] if blocks else []


def _memory(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    """Measured memory: with the model loaded, and at the peak of training."""
    known = [row for row in rows if row.done and row.mean("steps")]
    if not known:
        return []
    kind = known[0].done[0]["summary"]["memory"]["of"]
    lines, bars = [], {}
    for row in known:
        loaded, peak = row.mean("memory", "loaded"), row.mean("memory", "training")
        assert loaded is not None and peak is not None
        trained = row.mean("trainable_parameters") or 0
        lines.append(
            (*_labels(grid, row), f"{trained / 1e6:.3g} M", f"{loaded / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{(peak - loaded) / 1e6:.0f}")
        )
        bars[", ".join(reversed(_labels(grid, row)))] = (loaded / 1e6, (peak - loaded) / 1e6)
    header = (*_axes(grid), "trained", "loaded, MB", "peak, MB", "beyond, MB")
    blocks: list[Block] = [
        Heading("Memory"),
        Paragraph(f"Measured: {kind}, with model and data loaded and at the peak of training. A process counts its libraries too."),
        Table(header, lines),
    ]
    parts = {"model, data and libraries loaded": "#c3ccd6", "training beyond that": "#0072b2"}
    blocks.append(Figure("memory", "Peak memory", svg_text(stacked_bars(bars, parts, "MB at the peak"), "memory")))
    for each in grid.published:
        if each.what == "memory":
            theirs = [(m, each.model, t, s, f"{value:g}") for (t, s, m), value in each.values.items()]
            blocks += [
                Paragraph(f"Published: {each.source}."),
                Table(("method", "model", "task", "scheme", "GB"), theirs, frozenset(range(len(theirs)))),
            ]
    return blocks


def _time(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    lines = []
    for row in rows:
        if not (row.done and row.mean("steps")):
            continue
        clock, processor = row.per_step("seconds"), row.per_step("processor_seconds")
        lines.append(
            (
                *_labels(grid, row),
                f"{row.mean('steps'):.0f}",
                f"{row.mean('forward_passes'):.0f}",
                f"{row.mean('sequences_evaluated'):.0f}",
                "–" if clock is None else f"{1000 * clock:.0f}",
                "–" if processor is None else f"{1000 * processor:.0f}",
                duration_text(row.mean("training_seconds") or 0.0),
            )
        )
    header = (
        *_axes(grid),
        "steps",
        "forward passes",
        "sequences",
        "ms per step",
        "processor ms per step",
        "training, clock",
    )
    text = "A backward pass counts as two forward passes. Processor time is that of all threads, and leaves out what other programs take."
    return [Heading("Time"), Paragraph(text), Table(header, lines)] if lines else []


def _tried(grid: Grid, rows: Sequence[Row], find: Finder) -> list[Block]:
    """Every cell with its held-out score; the chosen one in bold."""
    lines = []
    for row in rows:
        for cell in row.cells if len(row.cells) > 1 else ():
            found = [result for run in runs_of(cell, grid.tune_seeds) if (result := find(run)) is not None]
            done = [result for result in found if result["status"] == "done"]
            scores = [score for result in done if (score := held_out(result)[0]) > float("-inf")]
            losses = [-loss for result in done if (loss := held_out(result)[1]) > float("-inf")]
            unscored = found[0]["status"] if found else "not run"
            text = percent(scores, done[0]["summary"]["metric"]) if scores else unscored
            tried = ", ".join(f"{name} {spelled(value)}" for name, value in cell.tried.items())
            mean_loss = f"{statistics.fmean(losses):.3f}" if losses else "–"
            mark = "**" if cell is row.best else ""
            lines.append((*_labels(grid, row), f"{mark}{tried}{mark}", text, mean_loss))
    if not lines:
        return []
    seeds = ", ".join(map(str, grid.tune_seeds))
    return [
        Heading("Hyperparameters tried"),
        Paragraph(f"Score and loss on held-out examples, seed {seeds}; the chosen ones in bold, ties by the loss."),
        Table((*_axes(grid), "tried", "held-out score", "held-out loss"), lines),
    ]


def _how(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    done = [result for row in rows for result in row.done]
    if not done:
        return []
    common = ", ".join(f"{name} {spelled(value)}" for name, value in grid.options.items())
    versions = ", ".join(f"{name} {version}" for name, version in done[0]["versions"].items())
    parts = [] if grid.protocol is None else [f"Protocol: {grid.protocol}, where the grid file says nothing else."]
    if grid.budget is not None:
        parts.append(f"Budget of a run: {grid.budget.amount} {grid.budget.kind.replace('_', ' ')} unless the grid file says otherwise.")
    parts += [f"Options of every run: {common}."] if common else []
    parts += [f"{versions}; {platform.machine()}, {os.cpu_count()} cores. `zotune bench GRID --dry_run` prints the command of every run."]
    return [Heading("How"), Paragraph(" ".join(parts))]


# -- parts --------------------------------------------------------------------------------------------------------------------------


def _axes(grid: Grid) -> list[str]:
    """The columns that identify a row: axes with one value are left out."""
    counts = {"model": len(grid.models), "task": len(grid.tasks), "scheme": len(grid.schemes)}
    return [axis for axis, count in counts.items() if count > 1] + ["method"]


def _line(grid: Grid, row: Row) -> str:
    """The label of a curve."""
    return row.place.method if len(grid.schemes) == 1 else f"{row.place.method}, {row.place.scheme}"


def _labels(grid: Grid, row: Row) -> list[str]:
    return [getattr(row.place, axis) for axis in _axes(grid)]


def _beyond(row: Row) -> float | None:
    peak, loaded = row.mean("memory", "training"), row.mean("memory", "loaded")
    return None if peak is None or loaded is None else peak - loaded


def _whole_time(row: Row) -> float | None:
    per_step, steps = row.per_step("processor_seconds"), row.mean("steps")
    return None if per_step is None or steps is None else per_step * steps


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}×" if ours is not None and theirs else "–"


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in label)
