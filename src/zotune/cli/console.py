"""A run on the console: description, progress, evaluations, and closing table."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from zotune.cli.progress import RunProgress
from zotune.cli.table import facts_table
from zotune.io.sizes import size_text
from zotune.io.text import duration_text, metric_text, shortened
from zotune.rewards.evaluation import Shown
from zotune.training.completions import prompt_text
from zotune.training.guard import PREFIX
from zotune.training.observer import RunObserver, RunResult, RunStart

#: Characters of a text in a table, at most.
LONGEST_CELL = 300


class EnduringConsole(Console):
    """A console on standard output; where its reader ends (`zotune train | head`), the command goes on and says so once."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("zotune: nobody reads standard output any more; the command goes on without it.", file=sys.stderr)


def new_console() -> Console:
    """Standard output, 120 columns wide where it is no terminal."""
    console = EnduringConsole()
    return console if console.is_terminal else EnduringConsole(width=120)


class ConsoleObserver(RunObserver):
    """Prints a run to a console (None: standard output); ``table``: end with a table of its figures."""

    def __init__(self, console: Console | None = None, *, table: bool = True):
        self.console, self.table = console or new_console(), table
        self.progress: RunProgress | None = None

    def begin(self, start: RunStart) -> None:
        self.console.print(
            f"{start.method}: {start.model}, {start.trainable / 1e6:.3g} M of {start.parameters / 1e6:.3g} M parameters are trained, "
            f"{start.dtype} on {start.device}",
            highlight=False,
        )
        sizes = ", ".join(f"{count} {part}" for part, count in start.sizes.items())
        self.console.print(f"{start.data}: {sizes}", highlight=False)
        if start.offload is not None:
            self.console.print(start.offload, highlight=False)

    def evaluated(self, when: str, metric: str, value: float) -> None:
        self.console.print(f"{when}: {metric.replace(PREFIX, 'guard ')} {metric_text(metric.removeprefix(PREFIX), value)}")

    def completions(self, step: int, shown: Sequence[Shown]) -> None:
        self.console.print(completions_table(f"completions at step {step}", shown))

    def callbacks(self, metric: str, first: float | None) -> Sequence[TrainerCallback]:
        self.progress = RunProgress(self.console, metric, first)
        return (self.progress,)

    def stopped(self) -> None:
        if self.progress is not None:
            self.progress.close()

    def finished(self, result: RunResult) -> None:
        if self.table:
            self.console.print(closing_table(result.summary))


def completions_table(title: str, shown: Sequence[Shown]) -> Table:
    """Prompts, completions and rewards of an evaluation; long texts are cut in their middle."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("prompt", "completion"):
        table.add_column(name, overflow="fold", ratio=1)
    names = list(shown[0].rewards)
    for name in names:
        table.add_column(name.removeprefix("reward_"), justify="right")
    for each in shown:
        texts = (Text(shortened(text, LONGEST_CELL)) for text in (prompt_text(each.prompt), each.completion))
        table.add_row(*texts, *(metric_text(name, each.rewards[name]) for name in names))
    return table


def closing_table(summary: Mapping[str, Any]) -> Any:
    """The closing table of a run."""
    metric = summary["metric"]
    rows = []
    if summary["before"] and summary["after"]:
        change = f"{metric_text(metric, summary['before'][metric])} → {metric_text(metric, summary['after'][metric])}"
        rows.append((metric, change))
    elif summary["after"]:
        rows.append((metric, metric_text(metric, summary["after"][metric])))
    if metric in (summary.get("held_out") or ()):
        rows.append((f"{metric} of held-out rows", metric_text(metric, summary["held_out"][metric])))
    for name in (name for name in summary["after"] or () if name.startswith(PREFIX)):
        if name != f"{PREFIX}loss" or f"{PREFIX}accuracy" not in summary["after"]:
            values = [metrics[name] for metrics in (summary["before"], summary["after"]) if metrics]
            rows.append((name.replace("_", " "), " → ".join(metric_text(name.removeprefix(PREFIX), value) for value in values)))
    loss, memory = summary["loss"], summary["memory"]
    if loss["last"] is not None:  # a run shorter than --logging_steps logs none
        sign, name = (-1, "reward") if metric == "reward" else (1, "loss")
        values = [sign * value + 0.0 for value in dict.fromkeys((loss["first"], loss["last"])) if value is not None]
        rows.append((f"training {name}", " → ".join(metric_text("loss", value) for value in values)))
    if summary["steps"]:
        rows.append(("steps", f"{summary['steps']} of {summary['batch_size']} examples, learning rate {_rate_text(summary)}"))
    if summary.get("privacy"):
        rows.append(("privacy", privacy_text(summary["privacy"])))
    rows += [
        ("forward passes", f"{summary['forward_passes']} ({summary['sequences_evaluated']} sequences)"),
        ("time", f"{duration_text(summary['training_seconds'])} of training"),
        ("peak memory", f"{size_text(memory['training'])} ({memory['of']}; {size_text(memory['loaded'])} before the first forward)"),
    ]
    rows += [(name, summary["files"][name]) for name in ("model", "journal", "curve", "completions", "summary") if name in summary["files"]]
    return facts_table(rows, f"{summary['method']} on {summary['data']}")


def privacy_text(spent: Mapping[str, Any]) -> str:
    """What a private run has spent."""
    relation = {"add-or-remove": "with or without an example", "replace-one": "with another example in its place"}[spent["neighbors"]]
    return f"ε = {spent['epsilon']:.4g} at δ = {spent['delta']:g} ({relation}), noise multiplier {spent['noise_multiplier']:.4g}"


def _rate_text(summary: Mapping[str, Any]) -> str:
    rate, first = summary["learning_rate"], summary["first_learning_rate"]
    if not isinstance(rate, str):
        return f"{rate:g}"
    return rate if first is None else f"{rate} ({first:.2g} at the first log entry)"
