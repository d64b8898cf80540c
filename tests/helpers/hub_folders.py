"""Data sets in the hub's layout, in a folder: below the working directory datasets reads them as it reads the hub's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zotune.tasks import Task


def save(folder: Path, task: Task, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """``rows`` by split, as the data set of a task below ``folder``."""
    assert task.hub is not None
    name = task.subset or "default"
    here = folder / task.hub / name
    here.mkdir(parents=True)
    files = "".join(f"  - {{split: {split}, path: {name}/{split}.jsonl}}\n" for split in rows)
    here.with_name("README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n")
    for split, content in rows.items():
        (here / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
