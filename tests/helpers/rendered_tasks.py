"""What real rows become under every template, as short JSON in tests/data/rendered.

Run as a program, with ZOTUNE_DATA set, it writes the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paths
from zotune import tasks

FOLDER = paths.TESTS / "data/rendered"
#: Places among the evaluation rows.
ROWS = (0, 41)
#: A longer prompt is kept as its two ends and a digest of all of it.
LONGEST = 400


def rendered(name: str, data_dir: str | Path) -> dict[str, Any]:
    """Template -> for each of the rows its prompt, options and right ones."""
    rows = tasks.load_rows(tasks.load(name), "eval", data_dir)
    return {template: [_one(tasks.load(name, template=template), rows[i]) for i in ROWS] for template in tasks.load(name).templates}


def _one(task: tasks.Task, row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, options = task.render(row)
    return {"prompt": _short(prompt), "options": [_short(option) for option in options], "right": list(task.right(row))}


def _short(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:100]} [... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]} ...] {text[-200:]}"


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


if __name__ == "__main__":
    if "ZOTUNE_DATA" not in os.environ:
        sys.exit("set ZOTUNE_DATA to the folder that holds <task>/<split>.jsonl[.gz]")
    FOLDER.mkdir(exist_ok=True)
    for task_name in tasks.names():
        text = json.dumps(rendered(task_name, os.environ["ZOTUNE_DATA"]), indent=1, ensure_ascii=False)
        path_of(task_name).write_text(text + "\n", encoding="utf-8")
