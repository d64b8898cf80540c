"""Shares of examples and of the values of a column, in order, with the rows that they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.attribution.shares import Shares
from zotune.io.suggest import did_you_mean
from zotune.tasks.sources import read_jsonl


@dataclass(frozen=True)
class TrainingRow:
    """A training example: its number in the source (a line of a file, from 1), and its row."""

    number: int
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A share.

    Attributes:
        label: the number of a row, or a value of a column.
        share: of the change of the validation loss, over the measured steps.
        error: its standard error.
        visits: measured steps that took the examples.
        examples: how many there are.
        row: of a single example.
    """

    label: str
    share: float
    error: float
    visits: int
    examples: int = 1
    row: Mapping[str, Any] | None = None

    def as_json(self) -> str:
        """A line of JSON; NaN is null."""
        error = None if math.isnan(self.error) else self.error
        entry = {"label": self.label, "share": self.share, "error": error, "visits": self.visits, "examples": self.examples}
        return json.dumps(entry if self.row is None else entry | {"row": self.row}, ensure_ascii=False)


def read_rows(path: Path) -> list[TrainingRow]:
    """The rows of a run's training examples.

    Raises:
        ValueError: the file is damaged.
    """
    found = []
    for line in read_jsonl(path):
        if not (isinstance(line.get("number"), int) and isinstance(line.get("row"), dict)):
            raise ValueError(f"{path} is damaged: a line has no number and row of a training example.")
        found.append(TrainingRow(line["number"], line["row"]))
    return found


def by_example(shares: Shares, rows: Sequence[TrainingRow] | None) -> list[Entry]:
    """The examples that were measured, the one that raised the loss most first."""
    entries = []
    for index, (share, error, visits) in enumerate(
        zip(*(each.tolist() for each in (shares.sums, shares.errors, shares.visits)), strict=True)
    ):
        if visits:
            source = None if rows is None else rows[index]
            label = str(index if source is None else source.number)
            entries.append(Entry(label, share, error, visits, row=None if source is None else source.row))
    return sorted(entries, key=lambda entry: -entry.share)


def by_column(entries: Sequence[Entry], column: str) -> list[Entry]:
    """Sums over the examples with the same value in a column, the value that raised the loss most first.

    Raises:
        ValueError: an example has no such column, or the rows are not known.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.row is None:
            raise ValueError("--by needs the rows of the training examples, which `zotune train` writes beside the journal.")
        if column not in entry.row:
            names = list(entry.row)
            raise ValueError(
                f"training row {entry.label} has no column {column!r}: it has {', '.join(names)}{did_you_mean(column, names)}."
            )
        groups.setdefault(str(entry.row[column]), []).append(entry)
    sums = [
        Entry(
            value,
            math.fsum(entry.share for entry in members),
            math.sqrt(math.fsum(entry.error**2 for entry in members)),
            sum(entry.visits for entry in members),
            len(members),
        )
        for value, members in groups.items()
    ]
    return sorted(sums, key=lambda entry: -entry.share)
