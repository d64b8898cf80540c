"""One page on one or several runs, to be looked at and sent: :func:`report`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.bench.document import Block, Code, Figure, Heading, Paragraph, Table, page
from zotune.bench.figures import curves
from zotune.io.figures import stacked_bars, svg_text
from zotune.io.text import duration_text, metric_text, shortened
from zotune.training import run_folder
from zotune.training.checkpoint import storage
from zotune.training.completions import COMPLETIONS_FILE
from zotune.training.predictions import PREDICTIONS_FILE

#: (key of a history entry, label of the axis)
AXES = (("step", "steps"), ("sequences", "sequences evaluated"), ("seconds", "seconds within steps"))
#: Completions of an evaluation that are shown, and characters of each text.
COMPLETIONS, CHARACTERS = 4, 300
#: Options that say where a run is, and not what it does.
_PLACES = ("output_dir", "logging_dir", "run_name")


@dataclass
class Run:
    """What a run's folder says.

    Attributes:
        name: of the run in the report.
        folder: of the run.
        record: `zotune_run.json`.
        summary: `summary.json`; None while the run has not ended.
        entries: of its log, in order; those of the newest checkpoint while it has not ended.
    """

    name: str
    folder: Path
    record: dict[str, Any]
    summary: dict[str, Any] | None
    entries: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        return str(self.record.get("metric") or "loss")

    @property
    def options(self) -> dict[str, Any]:
        groups = ("model_arguments", "data_arguments", "scheme", "training_arguments")
        found = {name: value for group in groups for name, value in (self.record.get(group) or {}).items()}
        return {name: value for name, value in found.items() if name not in _PLACES}


def read(folder: Path, name: str) -> Run:
    """A run's folder.

    Raises:
        FileNotFoundError, ValueError: it is no folder of a run, or a file in it is damaged.
    """
    record = run_folder.read_run(folder)
    summary = _json(folder / run_folder.SUMMARY_FILE) if (folder / run_folder.SUMMARY_FILE).is_file() else None
    entries: list[dict[str, Any]] = []
    saved = storage.checkpoints(folder)
    if summary is not None and (folder / run_folder.HISTORY_FILE).is_file():
        entries = list(_json(folder / run_folder.HISTORY_FILE).get("entries", []))
    elif saved and (saved[0] / "trainer_state.json").is_file():
        entries = list(_json(saved[0] / "trainer_state.json").get("log_history", []))
    return Run(name, folder, record, summary, entries)


def report(folders: Sequence[Path]) -> str:
    """The page of some runs, HTML with everything in it.

    Results side by side, curves of the evaluations and of the training loss against steps, sequences and seconds, memory, completions of
    rewarded runs, the options that differ, and the commands that continue, replay and share each run.

    Raises:
        FileNotFoundError, ValueError: see :func:`read`.
    """
    runs = [read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return page(f"zotune: {title}", list(_blocks(runs)))


def _blocks(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("Results")
    yield _results(runs)
    going = [run.name for run in runs if run.summary is None]
    if going:
        yield Paragraph(f"Not ended, shown up to the last checkpoint: {', '.join(going)}.")
    yield from _curves(runs)
    yield from _memory([run for run in runs if run.summary is not None])
    for run in runs:
        yield from _predictions(run)
        yield from _completions(run)
    yield from _options(runs)
    for run in runs:
        yield Heading(run.name if len(runs) > 1 else "How to go on")
        yield Code("\n".join(_commands(run)))


def _results(runs: Sequence[Run]) -> Table:
    header = ["run", "method", "scheme", "data", "steps", "sequences", "loss", "metric", "before", "after", "training"]
    rows = []
    for run in runs:
        found = run.summary or {}
        before, after = run.record.get("before") or {}, found.get("after") or {}
        steps = found.get("steps", max((int(e.get("step", 0)) for e in run.entries), default=0))
        sequences = found.get("sequences_evaluated", max((int(e.get("sequences", 0)) for e in run.entries), default=0))
        losses = [e["loss"] for e in run.entries if e.get("loss") is not None]
        seconds = found.get("training_seconds", max((float(e.get("seconds", 0)) for e in run.entries), default=0.0))
        rows.append(
            [
                run.name,
                str(run.options.get("method", "")),
                str(run.options.get("scheme", "")),
                str(found.get("data") or run.options.get("task") or Path(run.options.get("train_file") or "").name),
                f"{steps:,}",
                f"{sequences:,}",
                f"{losses[0]:.4g} → {losses[-1]:.4g}" if losses else "–",
                run.metric,
                metric_text(run.metric, before.get(run.metric)),
                metric_text(run.metric, after.get(run.metric)),
                duration_text(seconds),
            ]
        )
    return Table(header, rows)


def _curves(runs: Sequence[Run]) -> Iterator[Block]:
    """Runs of one metric together: another one has another axis."""
    for metric in dict.fromkeys(run.metric for run in runs):
        series = {run.name: [run.entries] for run in runs if run.metric == metric}
        drawing = curves(series, metric, metric, f"curves-{metric}", axes=AXES)
        if drawing is not None:
            yield Heading("Curves" if len({run.metric for run in runs}) == 1 else f"Curves: {metric}")
            yield Figure(f"curves-{metric}", f"{metric} on the evaluation examples, and training loss", drawing)


def _memory(runs: Sequence[Run]) -> Iterator[Block]:
    known = {run.name: run.summary["memory"] for run in runs if run.summary and "training" in (run.summary.get("memory") or {})}
    if not known:
        return
    parts = {"model and data loaded": "#0072b2", "more at the peak of training": "#d55e00"}
    bars = {name: [each["loaded"] / 1e9, max(0.0, each["training"] - each["loaded"]) / 1e9] for name, each in known.items()}
    yield Heading("Memory")
    of = ", ".join(dict.fromkeys(str(each.get("of", "")) for each in known.values()))
    yield Figure("memory", f"peak memory ({of})", svg_text(stacked_bars(bars, parts, "GB"), "memory"))


def _predictions(run: Run) -> Iterator[Block]:
    """Evaluation rows whose predicted option or class changed."""
    path = run.folder / PREDICTIONS_FILE
    found = _json(path) if path.is_file() else {}
    if run.summary is None or "changed" not in found:
        return
    right, wrong = found["became_right"], found["became_wrong"]
    yield Heading(f"Predictions of {run.name}")
    some = "; some of them:" if found["changed"] else "."
    yield Paragraph(f"Of {len(found['after'])} evaluation rows, {right} became right and {wrong} became wrong{some}")
    rows = [
        [*(shortened(" ".join(str(each[key]).split()), CHARACTERS) for key in ("before", "after", "right")), _row_text(each["row"])]
        for each in found["changed"]
    ]
    if rows:
        yield Table(["before", "after", "right answer", "row"], rows)


def _row_text(row: Mapping[str, Any]) -> str:
    return shortened("; ".join(f"{name}: {' '.join(str(value).split())}" for name, value in row.items()), CHARACTERS)


def _completions(run: Run) -> Iterator[Block]:
    path = run.folder / COMPLETIONS_FILE
    if not path.is_file():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    steps = sorted({line["step"] for line in lines})
    if not steps:
        return
    rows = []
    for number in sorted({line["number"] for line in lines})[:COMPLETIONS]:
        for step in dict.fromkeys((steps[0], steps[-1])):
            for line in [each for each in lines if each["step"] == step and each["number"] == number][:1]:
                prompt = line["prompt"] if isinstance(line["prompt"], str) else json.dumps(line["prompt"], ensure_ascii=False)
                rewards = line["rewards"] if isinstance(line["rewards"], list) else [line["rewards"]]
                texts = (shortened(" ".join(str(text).split()), CHARACTERS) for text in (prompt, line["completion"]))
                rows.append([str(step), *texts, ", ".join(map(str, rewards))])
    yield Heading(f"Completions of {run.name}")
    yield Table(["step", "prompt", "completion", "rewards"], rows)


def _options(runs: Sequence[Run]) -> Iterator[Block]:
    everything = [run.options for run in runs]
    names = sorted(set().union(*everything))
    if len(runs) > 1:
        differing = [name for name in names if len({json.dumps(options.get(name), sort_keys=True) for options in everything}) > 1]
        yield Heading("Options that differ")
        rows = [[f"{name}", *(_text(options.get(name)) for options in everything)] for name in differing]
        yield Table(["option", *(run.name for run in runs)], rows) if rows else Paragraph("None.")
    yield Heading("Options")
    for run in runs:
        lines = [f"{name}: {_text(value)}" for name, value in sorted(run.options.items()) if value not in (None, "", [], {})]
        yield Code("\n".join(lines), title=f"all options of {run.name}")


def _text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _commands(run: Run) -> Iterator[str]:
    folder, base = shlex.quote(str(run.folder)), shlex.quote(str(run.record.get("base_model") or "BASE"))
    words = shlex.split(str(run.record.get("command") or ""))[2:]
    yield "# what was run"
    yield shlex.join(["zotune", "train", *words])
    yield "# go on: after an interruption, or with more --max_steps"
    yield run_folder.resume_command(words)
    if (run.folder / run_folder.JOURNAL_FILE).is_file():
        yield "# rebuild the weights from the base model and the journal"
        yield f"zotune replay {base} {folder} --output_dir rebuilt"
    if run.summary is not None:
        yield "# share it"
        yield f"zotune push {folder} user/name --dry_run"


def _names(folders: Sequence[Path]) -> list[str]:
    """Shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run is named twice: name each folder once.")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): `zotune verify {path.parent}` says what else is.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object.")
    return content
