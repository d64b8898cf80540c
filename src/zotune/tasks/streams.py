"""The first rows of a data set that is read as it comes: what a run needs of one that is larger than the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zotune.tasks.rows import Rows, Table
from zotune.tasks.sources import hub_data

#: Rows among which the next one is drawn.
BUFFER = 10_000
_NUMBER = "zotune row number"


@dataclass(frozen=True)
class Stream:
    """How much of a data set is read.

    Args:
        train, eval: rows to train on (with those held out), and to evaluate on; None: all.
        seed: of their order.
    """

    train: int
    eval: int | None = None
    seed: int = 0


def streamed_rows(name: str, config: str | None, split: str, count: int | None, seed: int, fix: str) -> Rows:
    """The first rows of a split, drawn by seed among :data:`BUFFER` at a time; nothing behind them is read.

    Args:
        name, config, split: of the data set.
        count: rows to read; None: all.
        seed: of the order; the same rows for the same seed, files and version of `datasets`.
        fix: what to do where there are none, for messages.

    Raises:
        ValueError: they cannot be read.
    """
    import datasets  # slow to import, and not needed for files

    folder = Path(name).expanduser()
    data = hub_data(str(folder) if folder.is_dir() else name, config, split, fix, streaming=True)
    features = data.features
    numbered = data.map(_numbered, with_indices=True).shuffle(seed=seed, buffer_size=BUFFER)
    try:
        rows: list[dict[str, Any]] = list(islice(numbered, count))
    except Exception as error:  # a file that cannot be read, a lost connection
        raise ValueError(
            f"{name} (split {split}) cannot be read on ({type(error).__name__}: {' '.join(str(error).split())[:160]})."
        ) from None
    if not rows:
        raise ValueError(f"{name} (split {split}) holds no rows: {fix}.")
    numbers = [row.pop(_NUMBER) for row in rows]
    table = datasets.Dataset.from_list(rows, features=features)
    return Rows(Table(table), f"{name} (split {split})", numbers, unit="row")


def _numbered(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {**row, _NUMBER: number}
