"""`zotune influence`: how much each training example of a run changed a validation loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from zotune.attribution.figure import write_figure
from zotune.attribution.groups import Entry, by_column, by_example, read_rows
from zotune.attribution.shares import Shares, journal_path, shares_of
from zotune.cli.parser import CommandParser
from zotune.cli.table import wide_table
from zotune.io.atomic import write_text
from zotune.io.text import shortened
from zotune.optim.journal import Journal
from zotune.training import run_folder

ABOUT = (
    "Lists the training examples of a run that was started with --attribute, by their share of the change of the validation loss: those "
    "that raised it most, and those that lowered it most. Reads the run's journal alone; no model is loaded."
)
#: Characters of a row in the table.
_TEXT = 90


def main(argv: Sequence[str]) -> int:
    """Runs `zotune influence`."""
    parser = CommandParser("zotune influence", ABOUT)
    parser.add_argument("run", help="the run's folder, or its journal")
    parser.add_argument("--top", type=int, default=10, help="examples to list at each end (default 10)")
    parser.add_argument(
        "--by", metavar="COLUMN", help="a column of the training rows: list its values (classes, sources), not the examples"
    )
    parser.add_argument("--out", metavar="FILE", help="JSON Lines to write all shares to, with the rows")
    parser.add_argument(
        "--plot", metavar="FILE", help="figure to write: the sum of shares and the measured loss over the steps, a histogram"
    )
    args = parser.parse(argv)
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, not {args.top}.")
    path = journal_path(args.run, run_folder.JOURNAL_FILE)
    file = path.parent / run_folder.ROWS_FILE
    rows = read_rows(file) if file.is_file() else None
    shares = shares_of(Journal.open(path), None if rows is None else len(rows))
    examples = by_example(shares, rows)
    entries = examples if args.by is None else by_column(examples, args.by)
    print(_check_lines(shares, len(examples)))
    print(_table(entries, args.top, args.by))
    if shares.warning is not None:
        print(f"Warning: {shares.warning}")
    if args.out is not None:
        write_text(Path(args.out).expanduser(), "".join(entry.as_json() + "\n" for entry in entries))
    if args.plot is not None:
        write_figure(shares, examples, Path(args.plot).expanduser())
    return 0


def _check_lines(shares: Shares, examples: int) -> str:
    """The sum of the shares beside the change that was measured."""
    steps, taken = len(shares.steps), shares.taken
    scaled = f", times {shares.scale:.3g} for the steps that were not measured" if shares.scale > 1 else ""
    rows = [("sum of the shares", f"{shares.first:+.4g}", _error(shares.first_error), f"first order{scaled}")]
    if shares.second is not None:
        exact = (
            "one direction: exact to second order"
            if shares.method.directions_of(1) == 1 and not shares.method.own
            else "same direction only"
        )
        rows.append(("curvature", f"{shares.second:+.4g}", "", exact))
    if shares.measured is not None:
        note = f"of {shares.steps[0].loss:.4g}, which is known to ± {shares.loss_error:.2g} of the validation data's own"
        rows.append(("measured change", f"{shares.measured:+.4g}", "", note))
    title = f"{examples} examples in {steps} measured of {taken} steps of {shares.method.name}: change of the validation loss."
    return title + "\n" + wide_table(("", "change", "±", ""), rows)


def _error(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.2g}"


def _table(entries: Sequence[Entry], top: int, column: str | None) -> str:
    """The entries at both ends."""
    chosen = list(entries) if len(entries) <= 2 * top else [*entries[:top], None, *entries[-top:]]
    header = ("row" if column is None else column, "share", "±", "measured steps", "example" if column is None else "examples")
    lines = []
    for entry in chosen:
        if entry is None:
            lines.append(("…", "", "", "", ""))
            continue
        text = str(entry.examples) if column is not None else "" if entry.row is None else _shown(entry)
        lines.append((shortened(entry.label, 40), f"{entry.share:+.3g}", _error(entry.error), str(entry.visits), text))
    return wide_table(header, lines)


def _shown(entry: Entry) -> str:
    """A row in one line."""
    return shortened(json.dumps(entry.row, ensure_ascii=False), _TEXT).replace("[", r"\[")
