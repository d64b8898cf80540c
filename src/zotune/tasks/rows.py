"""Rows of data, each with its place in its source."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from zotune.io.failures import LONGEST
from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened

T = TypeVar("T")


@dataclass(frozen=True)
class Rows(Sequence):
    """A sequence of rows (dicts) with the place of each in its source.

    Attributes:
        rows: the rows, a list, :class:`Lines`, a :class:`Table` or a ``datasets.Dataset``.
        source: the file or data set, for messages.
        numbers: line number in the file (from 1) or row number of a table (from 0) of each row.
        unit: ``"line"`` or ``"row"``.
    """

    rows: Any
    source: str
    numbers: Sequence[int]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def where(self, index: int) -> str:
        """``"<file>, line 7"``, for an error message."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def map(self, function: Callable[..., T], *values: Iterable[Any]) -> list[T]:
        """``function`` of every row, or of ``values`` with one item per row; a ValueError names the row."""
        results = []
        for index, parts in enumerate(zip(*(values or (self,)), strict=True)):
            try:
                results.append(function(*parts))
            except ValueError as error:
                raise ValueError(shortened(f"{self.where(index)}: {error}", LONGEST)) from None
        return results

    @property
    def columns(self) -> list[str]:
        """Columns of all rows, in the order of the first row."""
        if hasattr(self.rows, "column_names"):
            return list(self.rows.column_names)
        common = dict.fromkeys(self.rows[0])
        for row in self.rows:
            if not common.keys() <= row.keys():
                common = {name: None for name in common if name in row}
        return list(common)

    def column(self, name: str) -> list[Any]:
        """One column's values."""
        return list(self.rows[name]) if hasattr(self.rows, "column_names") else [row[name] for row in self.rows]

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows at these indices, in this order."""
        indices = list(indices)
        rows = self.rows.select(indices) if hasattr(self.rows, "select") else [self.rows[i] for i in indices]
        return replace(self, rows=rows, numbers=array("Q", (self.numbers[i] for i in indices)))

    def require(self, names: Iterable[str]) -> None:
        """ValueError naming the first of these columns that is missing, and the row where it is."""
        everywhere = set(self.columns)
        for name in names:
            if name in everywhere:
                continue
            index = 0
            if not hasattr(self.rows, "column_names"):
                index = next(i for i, row in enumerate(self.rows) if name not in row)
            present = list(self.rows[index])
            place = self.source if index == 0 else self.where(index)
            raise ValueError(f"{place} has no column {name!r}: it has {shortened(', '.join(present), 400)}{did_you_mean(name, present)}.")


class Lines(Sequence):
    """The rows of a JSON Lines file, held as bytes: one is parsed whenever it is read.

    Args:
        data: the lines, one after the other.
        ends: byte behind each line.
        chosen: indices of the rows; all by default.
    """

    def __init__(self, data: bytes | bytearray, ends: array[int], chosen: Sequence[int] | None = None) -> None:
        self.data, self.ends, self.chosen = data, ends, range(len(ends)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Lines(self.data, self.ends, self.chosen[index])
        line = self.chosen[index]
        return json.loads(self.data[self.ends[line - 1] if line else 0 : self.ends[line]])

    def select(self, indices: Iterable[int]) -> Lines:
        """The rows at these indices, in this order."""
        return Lines(self.data, self.ends, array("Q", (self.chosen[index] for index in indices)))


class Table(Sequence):
    """The rows of a ``datasets.Dataset``, without the null values that Arrow writes where only other rows have a key.

    A column that is null stays; within its lists and objects (messages, tools) keys that are null are left out.

    Args:
        data: the data set.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Table(self.data.select(range(*index.indices(len(self.data)))))
        return list(self.data[index]) if isinstance(index, str) else _without_nulls(self.data[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_without_nulls, self.data)

    @property
    def column_names(self) -> list[str]:
        """Columns of all rows."""
        return list(self.data.column_names)

    @property
    def features(self) -> Mapping[str, Any]:
        """Types of the columns."""
        return self.data.features

    def select(self, indices: Iterable[int]) -> Table:
        """The rows at these indices, in this order."""
        return Table(self.data.select(indices))


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _bare(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, list):
        return [_bare(each) for each in value]
    return {key: _bare(each) for key, each in value.items() if each is not None} if isinstance(value, dict) else value
