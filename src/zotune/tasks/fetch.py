"""Rows of a task from the Hugging Face hub as local files: :func:`fetch`, with a digest of what a run reads of them."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.io.atomic import whole_file
from zotune.tasks.sources import Rows, clean, hub_rows
from zotune.tasks.task import Task

#: Seed of the rows that are drawn from a split (the one of the tables in the documentation).
SEED = 0


@dataclass(frozen=True)
class Fetched:
    """A file that was written.

    Attributes:
        path: the file.
        rows, of: its rows, and those of the split.
        digest: :func:`digest` of its rows.
    """

    path: Path
    rows: int
    of: int
    digest: str


def fetch(task: Task, data_dir: str | Path, num_train: int | None = None, num_eval: int | None = None) -> list[Fetched]:
    """Writes ``<data_dir>/<task>/<split>.jsonl`` for both splits of a task, every column, in the hub's order.

    Args:
        task: one with a data set on the hub; rows without a gold label are left out.
        data_dir: the folder that ``--data_dir`` names.
        num_train, num_eval: most rows of a split; ``random.Random(0).sample`` over the row numbers draws them.

    Raises:
        ValueError: a number is no positive one, a file is there already, or the hub cannot be read.
    """
    wanted = {"train": num_train, "eval": num_eval}
    paths = {}
    for use, number in wanted.items():
        if number is not None and number < 1:
            raise ValueError(f"num_{use}={number}: give 1 or more, or leave it out for the whole split.")
        split = task.splits[use]
        paths[use] = Path(data_dir) / task.name / f"{task.files.get(use, split)}.jsonl"
        for there in (paths[use], paths[use].with_name(paths[use].name + ".gz")):
            if there.exists():
                raise ValueError(f"{there} is there already: move it away, or give another --data_dir.")
    fix = "see to the connection, and to HF_HUB_OFFLINE, which must not be set"
    everything = {use: clean(hub_rows(task, task.splits[use], fix), task) for use in wanted}  # both are read before one is written
    return [_write(task, everything[use], wanted[use], path) for use, path in paths.items()]


def digest(task: Task, rows: Rows) -> str:
    """Hex digits, 16, of what a task reads of rows, in their order: its columns and the answer, texts without blanks at their ends."""
    names = sorted({*task.columns, task.label_column})
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([_bare(row[name]) for name in names], ensure_ascii=False).encode())
    return found.hexdigest()[:16]


def _bare(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _write(task: Task, rows: Rows, number: int | None, path: Path) -> Fetched:
    total = len(rows)
    if number is not None and number < total:
        rows = rows.select(sorted(random.Random(SEED).sample(range(total), number)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return Fetched(path, len(rows), total, digest(task, rows))
