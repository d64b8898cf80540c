"""The progress of a bench: a live view on a terminal, elsewhere a line per run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zotune.bench.plan import Run
from zotune.bench.selection import test_score
from zotune.io.sizes import size_text
from zotune.io.text import duration_text, metric_text


class Progress:
    """Prints the progress of a bench to a console."""

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self.total = self.ended_here = 0
        self.at_start: int | None = None

    def begin(self, total: int) -> None:
        """Starts the view; ``total``: runs of the grid."""
        self.total, self.started = total, time.perf_counter()
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def show(self, done: int, running: Mapping[Run, str]) -> None:
        """Shows the number of results and the last line of each running run."""
        if self.at_start is None:
            self.at_start = done
            if done:
                self.console.print(f"{done} of {self.total} runs are done already.", highlight=False)
        if self.live is None:
            return
        head = Table.grid(padding=(0, 2))
        head.add_row(ProgressBar(self.total, done, width=30), f"{done}/{self.total} runs", self._left(done))
        lines = [Text(f"{run.title}: {said}", overflow="ellipsis", no_wrap=True) for run, said in running.items()]
        self.live.update(Group(head, *lines))

    def ended(self, run: Run, result: Mapping[str, Any]) -> None:
        """Prints the result of a run."""
        self.ended_here += 1
        number = f"{(self.at_start or 0) + self.ended_here}/{self.total}"
        if result["status"] != "done":
            self.console.print(
                f"{number} {run.title}: {result['status']}. {result['reason']}", highlight=False, markup=False, soft_wrap=True
            )
            return
        summary, score = result["summary"], test_score(result)
        facts = "" if score is None else f"{summary['metric']} {metric_text(summary['metric'], score)}, "
        facts += f"{duration_text(summary['total_seconds'])}, {size_text(summary['memory']['training'])}"
        self.console.print(f"{number} {run.title}: {facts}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the view."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _left(self, done: int) -> str:
        if not self.ended_here:
            return ""
        return f"about {duration_text((time.perf_counter() - self.started) / self.ended_here * (self.total - done))} left"
