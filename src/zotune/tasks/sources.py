"""Rows from a local folder, the Hugging Face hub or a JSON Lines file; seeded subsets and demonstrations of them."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from zotune.io.failures import LONGEST
from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened
from zotune.tasks.task import Task

T = TypeVar("T")

#: Most bytes per line of a JSON Lines file, against files that unpack to one endless line.
LONGEST_LINE = 1 << 26
#: Most bytes that a byte of a packed file may unpack to, after the first :data:`FREE_BYTES`; text unpacks to 2 to 30 times its bytes.
MOST_UNPACKED, FREE_BYTES = 100, 1 << 24
#: Most blank lines beside those that may follow rows.
MOST_BLANK = 1000
#: Between demonstrations, and before the prompt (as MeZO, 2305.17333).
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Rows(Sequence):
    """A sequence of rows (dicts) with the place of each in its source.

    Attributes:
        rows: the rows, a list or a ``datasets.Dataset``.
        source: the file or data set, for messages.
        numbers: line number in the file (from 1) or row number on the hub (from 0) of each row.
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


def read_jsonl(path: str | Path, longest: int = LONGEST_LINE) -> Rows:
    """Rows of a JSON Lines file (UTF-8, one object per line, gzip for .gz), without blank lines; ValueError where it is not one.

    ``longest``: bytes of a line, at most.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}: give the path of a JSON Lines file (.jsonl or .jsonl.gz).")
    data, ends, numbers = bytearray(), array("Q"), array("Q")
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else nullcontext(raw) as lines:
            size, checked = 0, FREE_BYTES
            for number, line in enumerate(iter(lambda: lines.readline(longest + 1), b""), start=1):
                size += len(line)
                if len(line) > longest:
                    raise ValueError(f"{path}, line {number} is longer than {longest} bytes: one JSON object per line is expected.")
                if size > checked:
                    if size > MOST_UNPACKED * max(raw.tell(), 1):
                        raise ValueError(f"{path} unpacks to more than {MOST_UNPACKED} times its bytes: unpack it if you trust it.")
                    checked = size + FREE_BYTES // 16
                if line.strip():
                    _object(line, path, number)
                    data += line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    ends.append(len(data))
                    numbers.append(number)
                elif number - len(numbers) > len(numbers) + MOST_BLANK:
                    raise ValueError(f"{path} has more blank lines than rows: one JSON object per line is expected.")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked as gzip ({error}): compress it again, or drop the .gz.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not ends:
        raise ValueError(f"{path} holds no rows: one JSON object per line is expected.")
    return Rows(Lines(data, ends), str(path), numbers)


def load_rows(task: Task, split: str, data_dir: str | Path | None = None) -> Rows:
    """Rows of a task's split: ``<data_dir>/<task>/<split>.jsonl[.gz]``, or from the hub without a `data_dir`.

    Args:
        task: rows without a gold label are dropped.
        split: ``"train"`` or ``"eval"``, or a split's own name.
        data_dir: the local folder.

    Raises:
        ValueError: the folder, file, data set or a column does not exist.
    """
    name = task.splits.get(split, split)
    rows = _local(task, task.files.get(split, name), Path(data_dir)) if data_dir is not None else hub_rows(task, name)
    return clean(rows, task)


def clean(rows: Rows, task: Task) -> Rows:
    """The rows with a gold label; ValueError where a column of the task is missing."""
    rows.require([*task.columns, task.label_column])
    if task.drop_labels:
        labels = rows.column(task.label_column)
        rows = rows.select(i for i, label in enumerate(labels) if label not in task.drop_labels)
        if not len(rows):
            raise ValueError(f"{rows.source} holds no row with a gold label in column {task.label_column!r}.")
    return rows


def split_train(
    rows: Rows,
    *,
    seed: int,
    num_train: int | None = None,
    num_dev: int | None = None,
    k_shot: int | None = None,
    answers: Sequence[int] | None = None,
) -> tuple[Rows, Rows | None]:
    """Training rows and held-out dev rows, a pure function of (rows, arguments).

    The dev rows are drawn first, so they do not depend on `num_train` or `k_shot`.

    Args:
        rows: to split.
        seed: of a generator; the global ones are not touched.
        num_train: most training rows.
        num_dev: dev rows; with `k_shot` balanced over the classes.
        k_shot: training rows per class, in place of `num_train`.
        answers: class of each row, for `k_shot`.

    Raises:
        ValueError: there are too few rows.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    if num_dev and num_dev >= len(order):
        raise ValueError(f"num_dev={num_dev} leaves nothing to train on: {rows.source} holds {len(order)} rows; choose fewer.")
    if k_shot is None:
        dev, rest = order[: num_dev or 0], order[num_dev or 0 :]
        train = rest[:num_train]
    else:
        if answers is None:
            raise ValueError("k_shot needs a task with labels: pass --task, or use --num_train instead.")
        if num_train is not None:
            raise ValueError("num_train and k_shot exclude each other: leave one out.")
        dev = _round_robin(order, answers, num_dev or 0, leaving=k_shot)
        held = set(dev)
        train = _k_of_each([row for row in order if row not in held], answers, k_shot, rows.source)
    return rows.select(sorted(train)), rows.select(sorted(dev)) if dev else None


def sample(rows: Rows, number: int | None, *, seed: int) -> Rows:
    """At most ``number`` of the rows, drawn by seed, in their order; None: all."""
    if number is None or number >= len(rows):
        return rows
    return rows.select(sorted(random.Random(f"{seed}/eval").sample(range(len(rows)), number)))


def demonstrated(task: Task, rows: Rows) -> Task:
    """The task with these rows, each with its right option, before every prompt; ValueError names a row with an unknown label."""
    return replace(task, preamble="".join(rows.map(partial(_solved, task))))


def demonstrated_anew(task: Task, rows: Rows, number: int, *, seed: int) -> Task:
    """The task with ``number`` of the rows, solved, before every prompt: others for each, drawn by seed and the row's content."""

    def preamble_of(row: Any) -> str:
        content = json.dumps(row, sort_keys=True, default=str)
        chosen = random.Random(f"{seed}/demonstrations/{content}").sample(range(len(rows)), number)
        return "".join(rows.select(chosen).map(partial(_solved, task)))

    return replace(task, preamble_of=preamble_of)


def _solved(task: Task, row: Any) -> str:
    if task.has_mask:  # the label word stands where its mask does
        return task.render_filled(row) + SEPARATOR
    prompt, options = task.render(row)
    return prompt + options[task.answer(row)] + SEPARATOR


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
        row = json.loads(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {number} is not UTF-8 text: save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not valid JSON ({error.msg} at column {error.colno}).") from None
    except UnicodeEncodeError:
        raise ValueError(f"{path}, line {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text.") from None
    except RecursionError:
        raise ValueError(f"{path}, line {number} is nested too deeply.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path}, line {number} holds a number that cannot be read ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(
            f'{path}, line {number} holds a {type(row).__name__}, not an object such as {{"prompt": "...", "completion": "..."}}.'
        )
    if not row:
        raise ValueError(f"{path}, line {number} holds an object without columns.")
    return row


def _local(task: Task, split: str, data_dir: Path) -> Rows:
    folder = data_dir / task.name
    if not data_dir.is_dir():
        raise ValueError(f"no data folder {data_dir}: --data_dir must hold <task>/<split>.jsonl[.gz].")
    if not folder.is_dir():
        present = sorted(path.name for path in data_dir.iterdir() if path.is_dir())
        raise ValueError(f"no folder {folder}{did_you_mean(task.name, present)}; {data_dir} holds {_listed(present)}.")
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            return read_jsonl(folder / name)
    present = sorted(path.name for path in folder.iterdir())
    raise ValueError(f"no file {split}.jsonl or {split}.jsonl.gz in {folder}: it holds {_listed(present)}.")


def hub_rows(task: Task, split: str, fix: str | None = None) -> Rows:
    """All rows of a split on the hub; ValueError, with the ``fix``, where they cannot be read."""
    fix = fix or f"pass --data_dir, a folder with {task.name}/{split}.jsonl[.gz]"
    if not task.hub:
        raise ValueError(f"task {task.name!r} names no hub data set: {fix}.")
    import datasets  # slow to import, and not needed for local files

    name = task.hub + (f"/{task.subset}" if task.subset else "")
    try:
        try:
            data = datasets.load_dataset(task.hub, task.subset, split=split)
        except RuntimeError as error:  # the data set is a program, which datasets 4 no longer runs: the hub's own export of its rows
            if "scripts are no longer supported" not in str(error):
                raise
            data = datasets.load_dataset(task.hub, task.subset, split=split, revision="refs/convert/parquet")
    except Exception as error:  # offline, absent, gated, no such split: the same fix for all
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"cannot load {name} (split {split}) from the Hugging Face hub ({type(error).__name__}: {reason}): {fix}."
        ) from None
    if not len(data):
        raise ValueError(f"{name} (split {split}) on the Hugging Face hub holds no rows.")
    return Rows(data, f"{name} (split {split})", range(len(data)), unit="row")


def _round_robin(order: Sequence[int], answers: Sequence[int], number: int, leaving: int) -> list[int]:
    """The first ``number`` rows, taken from the classes in rotation; the last ``leaving`` of each class are not taken."""
    by_class: dict[int, list[int]] = {}
    for row in order:
        by_class.setdefault(answers[row], []).append(row)
    rounds = itertools.zip_longest(*(by_class[answer][: max(0, len(by_class[answer]) - leaving)] for answer in sorted(by_class)))
    return [row for each in rounds for row in each if row is not None][:number]


def _k_of_each(order: Sequence[int], answers: Sequence[int], k: int, source: str) -> list[int]:
    """The first k indices of each class, in the given order."""
    chosen: dict[int, list[int]] = {answer: [] for answer in sorted(set(answers))}
    for index in order:
        if len(chosen[answers[index]]) < k:
            chosen[answers[index]].append(index)
    for answer, indices in chosen.items():
        if len(indices) < k:
            raise ValueError(f"k_shot={k}, but {source} has {len(indices)} training rows of class {answer}; choose a smaller one.")
    return [index for indices in chosen.values() for index in indices]


def _listed(names: Sequence[str], most: int = 12) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
