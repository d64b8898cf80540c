"""The columns of rows without a task: their names in the data, and what each form of a row uses, ignores and refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened
from zotune.tasks import chat
from zotune.tasks.rows import Rows

_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,15})(\.[0-9]+)?")

#: Column sets of rows without a task, in order of precedence.
FORMATS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
#: Columns with an effect, by the first column of the form.
USED: Mapping[str, tuple[str, ...]] = {
    "messages": chat.COLUMNS,
    "conversations": ("conversations", "system", *chat.COLUMNS[1:]),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output", "system"),
    "text": ("text",),
}
#: Columns that a row of a form may lack.
OPTIONAL = (*chat.COLUMNS[1:], "input", "system")
#: Columns that are known to say nothing on training: they are ignored without a word.
IGNORED: Mapping[str, tuple[str, ...]] = {
    "messages": ("parallel_tool_calls", "id"), "conversations": ("id",), "prompt": ("id",), "instruction": ("id",), "text": ("id",),
}  # fmt: skip
#: Columns that are refused, with the fix.
REFUSED: Mapping[str, Mapping[str, str]] = {
    "messages": {
        "functions": "write the functions as 'tools'",
        "function_call": "write calls as 'tool_calls' of a message",
    },
    "conversations": {},
    "prompt": {},
    "instruction": {"history": "write earlier turns as 'messages'"},
    "text": {},
}


def format_of(rows: Rows) -> tuple[str, ...]:
    """The column set of rows without a task; ValueError where they have none of :data:`FORMATS`."""
    found = all_columns(rows)
    present = set(found)
    for columns in FORMATS:
        if present.issuperset(columns):
            rows.require(columns)
            return columns
    # One column of a pair is there: name the other.
    known = [name for columns in FORMATS for name in columns]
    near = next((text for name in found if (text := did_you_mean(name, known))), "")
    if len(present & {"prompt", "completion"}) == 1:
        near = f"; the column {({'prompt', 'completion'} - present).pop()!r} is missing"
    raise ValueError(
        f"{rows.source} needs the columns prompt and completion, or text, or messages (or pass --task): "
        f"it has {shortened(', '.join(found), 400)}{near}. Columns of other names: --columns text=NAME."
    )


def unused(rows: Rows, columns: tuple[str, ...], *, chats: bool = False) -> list[str]:
    """Columns of any row that have no effect, in order; ValueError for one that is refused. ``chats``: the rows become chats."""
    form = columns[0]
    found = all_columns(rows)
    for name in REFUSED[form].keys() & set(found):
        if any(row.get(name) is not None for row in rows):
            raise ValueError(f"{rows.source} has the column {name!r}, which is not read: {REFUSED[form][name]}.")
    also = chat.COLUMNS[1:] if chats and form == "prompt" else ()
    return [name for name in found if name not in (*USED[form], *IGNORED[form], *also)]


def all_columns(rows: Rows) -> list[str]:
    """Columns of any row, in order."""
    names: Iterable[str] = rows.columns if hasattr(rows.rows, "column_names") else (name for row in rows for name in row)
    return list(dict.fromkeys(names))


def parsed_columns(columns: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """What columns are called here -> in the data, also of words such as ``text=body``; ValueError for other words."""
    if columns is None:
        return {}
    if isinstance(columns, Mapping):
        pairs = list(columns.items())
    else:
        wrong = next((word for word in columns if "=" not in word), None)
        if wrong is not None:
            raise ValueError(f"columns: {wrong!r} is not NAME=COLUMN, such as text=body for texts that are in the column body.")
        pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in columns]
    found = dict(pairs)
    if len(found) < len(pairs) or not all(found):
        raise ValueError(f"columns: a name is given twice or is empty in {' '.join(map('='.join, pairs))}.")
    return found


def renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """The rows with the names of :func:`parsed_columns`; a name without a column leaves it out.

    Raises:
        ValueError: a column is in no row, or one that every row needs is missing in one.
    """
    if not columns:
        return rows
    present = all_columns(rows)
    for name, column in columns.items():
        if column and column not in present:
            raise ValueError(
                f"columns: {name}={column} names no column of {rows.source}{did_you_mean(column, present)}: it has "
                f"{shortened(', '.join(present), 400)}."
            )
    rows.require([column for name, column in columns.items() if column and name not in OPTIONAL])
    return replace(rows, rows=(_RenamedTable if hasattr(rows.rows, "column_names") else _Renamed)(rows.rows, columns))


def with_numbers(rows: Rows, column: str) -> Rows:
    """The rows with the values of a column as numbers, where all of them are texts of numbers (7, -1, 0.5, but not 007)."""
    if column not in rows.columns or not all(isinstance(value, str) and _NUMBER.fullmatch(value) for value in rows.column(column)):
        return rows
    return replace(rows, rows=_WithNumbers(rows.rows, {}, column))


class _Renamed(Sequence):
    """Rows whose columns have other names."""

    def __init__(self, rows: Any, columns: Mapping[str, str]) -> None:
        self.rows, self.columns, self.taken = rows, columns, set(columns.values())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return type(self)(self.rows[index], self.columns) if isinstance(index, slice) else self._row(self.rows[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._row, self.rows)

    def select(self, indices: Iterable[int]) -> _Renamed:
        """The rows at these indices, in this order."""
        return type(self)(self.rows.select(list(indices)), self.columns)

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: row[column] for name, column in self.columns.items() if column in row}
        return found | {name: value for name, value in row.items() if name not in self.taken and name not in self.columns}


class _WithNumbers(_Renamed):
    """Rows with numbers in a column."""

    def __init__(self, rows: Any, columns: Mapping[str, str], column: str = "label") -> None:
        super().__init__(rows, columns)
        self.column = column

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        value = str(row[self.column])
        return {**row, self.column: float(value) if "." in value else int(value)}


class _RenamedTable(_Renamed):
    """The same of rows that have all columns."""

    @property
    def column_names(self) -> list[str]:
        """Columns of all rows."""
        return list(self._row(dict.fromkeys(self.rows.column_names)))

    @property
    def features(self) -> Mapping[str, Any]:
        """Types of the columns."""
        return self._row(self.rows.features)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.columns.get(index, index)] if isinstance(index, str) else super().__getitem__(index)
