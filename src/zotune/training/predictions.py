"""What a run predicted for its evaluation rows before and after training: `predictions.json`, with the rows that changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer_utils import EvalLoopOutput

from zotune.io.json_files import write_json
from zotune.tasks import PreparedData
from zotune.tasks.metrics import predictions

PREDICTIONS_FILE = "predictions.json"
#: Rows that are kept of each kind, those that became right and those that became wrong.
KEPT = 5


def chosen(output: EvalLoopOutput) -> tuple[list[int], list[int]] | None:
    """(predicted, right) index of an option or class for each row; None where the predictions are no choices."""
    scores, answers = output.predictions, output.label_ids
    if not (isinstance(scores, np.ndarray) and isinstance(answers, np.ndarray)):
        return None
    if scores.ndim != 2 or answers.ndim != 1 or not np.issubdtype(answers.dtype, np.integer):
        return None
    return predictions(scores).tolist(), answers.tolist()


def write_before(folder: Path, output: EvalLoopOutput | None) -> None:
    """Keeps the predictions before training in the run's folder."""
    found = None if output is None else chosen(output)
    if found is not None:
        write_json(folder / PREDICTIONS_FILE, {"before": found[0]})


def write_after(folder: Path, output: EvalLoopOutput | None, data: PreparedData) -> None:
    """Adds those after training, and some of the rows that changed; nothing where those before are not known."""
    found, path = None if output is None else chosen(output), folder / PREDICTIONS_FILE
    if found is None or not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["before"]
    except (ValueError, LookupError, TypeError):
        return
    after, answers = found
    if not (isinstance(before, list) and len(before) == len(after) and all(isinstance(each, int) for each in before)):
        return  # of other evaluation rows
    right = [i for i, (old, new, answer) in enumerate(zip(before, after, answers, strict=True)) if old != answer and new == answer]
    wrong = [i for i, (old, new, answer) in enumerate(zip(before, after, answers, strict=True)) if old == answer and new != answer]
    kept = sorted([*right[:KEPT], *wrong[:KEPT]])
    content = {
        "before": before,
        "after": after,
        "became_right": len(right),
        "became_wrong": len(wrong),
        "changed": [_entry(i, before[i], after[i], answers[i], data) for i in kept],
    }
    write_json(path, content)


def _entry(index: int, before: int, after: int, answer: int, data: PreparedData) -> dict[str, Any]:
    names = data.label_names
    source = {} if data.eval_rows is None else data.eval_rows[index]
    row = {name: value for name, value in source.items() if isinstance(value, str | int | float)}
    return {"row": row, "right": _name(answer, names), "before": _name(before, names), "after": _name(after, names)}


def _name(index: int, names: Sequence[str]) -> str:
    return "not finite" if index < 0 else names[index] if index < len(names) else f"option {index + 1}"
