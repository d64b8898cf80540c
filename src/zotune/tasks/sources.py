"""Rows of tasks from a local folder or the Hugging Face hub; seeded subsets and demonstrations of rows."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from zotune.io.suggest import did_you_mean
from zotune.tasks.files import read_jsonl as read_jsonl
from zotune.tasks.rows import Rows as Rows
from zotune.tasks.task import Task

#: Between demonstrations, and before the prompt (as MeZO, 2305.17333).
SEPARATOR = "\n\n"


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
    data = hub_data(task.hub, task.subset, split, fix)
    name = task.hub + (f"/{task.subset}" if task.subset else "")
    return Rows(data, f"{name} (split {split})", range(len(data)), unit="row")


def hub_data(hub: str, subset: str | None, split: str, fix: str, *, streaming: bool = False) -> Any:
    """A split of a data set on the hub, or in a folder of its layout, as ``datasets.Dataset``; ValueError, with the ``fix``.

    ``streaming``: as ``datasets.IterableDataset``.
    """
    import datasets  # slow to import, and not needed for local files

    name = hub + (f"/{subset}" if subset else "")
    where = "in this folder" if Path(hub).is_dir() else "on the Hugging Face hub"
    try:
        try:
            data = datasets.load_dataset(hub, subset, split=split, streaming=streaming)
        except RuntimeError as error:  # the data set is a program, which datasets 4 no longer runs: the hub's own export of its rows
            if "scripts are no longer supported" not in str(error):
                raise
            data = datasets.load_dataset(hub, subset, split=split, streaming=streaming, revision="refs/convert/parquet")
    except Exception as error:  # offline, absent, gated, no such split: the same fix for all
        reason = " ".join(str(error).split())[:160]
        place = "" if where == "in this folder" else "from the Hugging Face hub "
        raise ValueError(f"cannot load {name} (split {split}) {place}({type(error).__name__}: {reason}): {fix}.") from None
    if not streaming and not len(data):
        raise ValueError(f"{name} (split {split}) {where} holds no rows.")
    return data


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
