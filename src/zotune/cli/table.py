"""Tables for the console."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def wide_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text, as wide as the terminal, or 150 columns in a file or pipe."""
    here = Console()
    buffer = io.StringIO()
    console = Console(file=buffer, width=here.width if here.is_terminal else 150)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())


def facts_table(rows: Sequence[tuple[str, str]], title: str) -> Table:
    """A two-column table of a run's facts."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table
