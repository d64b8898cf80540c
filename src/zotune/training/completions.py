"""A few completions of each evaluation: kept in `completions.jsonl`, and given to the services of `report_to`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback

from zotune.io.atomic import whole_file
from zotune.rewards.evaluation import Shown

#: Of a run's folder.
COMPLETIONS_FILE = "completions.jsonl"


class CompletionLog:
    """Writes the completions of evaluations; a resumed run that evaluates a step again replaces its lines.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: int | None = None  # step of the last line; None: the file is not read yet

    def write(self, step: int, shown: Sequence[Shown]) -> None:
        """Appends the completions of an evaluation; lines of this step or later ones that another process wrote are replaced."""
        lines = "".join(json.dumps({"step": step, **each._asdict()}, ensure_ascii=False, default=str) + "\n" for each in shown)
        data = lines.encode("utf-8", "replace")
        if self._last is not None and self._last <= step:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        else:
            kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] < step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                partial.write_bytes(b"".join(kept) + data)
        self._last = step


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that are complete; a cut one at its end is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if isinstance(json.loads(line)["step"], int) and line.endswith(b"\n"):
                found.append(line)
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return found


def report(callbacks: Sequence[Any], step: int, shown: Sequence[Shown]) -> None:
    """Gives completions to TensorBoard, as text, and to Weights & Biases and Trackio, as a table, where a trainer reports to them."""
    columns = ["step", "prompt", "completion", *shown[0].rewards]
    rows = [[step, prompt_text(each.prompt), each.completion, *each.rewards.values()] for each in shown]
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None) if isinstance(callback, TensorBoardCallback) else None
        if writer is not None:
            writer.add_text("completions", _markdown(shown), step)
        if type(callback).__name__ == "WandbCallback":
            import wandb

            if wandb.run is not None:
                wandb.log({"completions": wandb.Table(columns=columns, data=rows)}, commit=False)
        if type(callback).__name__ == "TrackioCallback":
            import pandas
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))})


def prompt_text(prompt: Any) -> str:
    """A prompt as text; messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _markdown(shown: Sequence[Shown]) -> str:
    def cell(text: Any) -> str:
        return str(text).replace("|", "\\|").replace("\n", "<br>")

    names = list(shown[0].rewards)
    lines = ["| prompt | completion | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    lines += ["| " + " | ".join(map(cell, (prompt_text(each.prompt), each.completion, *each.rewards.values()))) + " |" for each in shown]
    return "\n".join(lines)
