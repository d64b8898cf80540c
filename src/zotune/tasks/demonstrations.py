"""Solved examples before every prompt: in-context learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zotune.tasks.sources import Rows
from zotune.tasks.task import Task

#: What stands between two demonstrations, and between the last and the prompt (MeZO's choice, 2305.17333).
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class DemonstratedTask(Task):
    """A task whose prompts begin with the same solved examples."""

    preamble: str = ""

    def render(self, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """Prompt and answer options of a row, the prompt behind the demonstrations."""
        prompt, options = super().render(row)
        return self.preamble + prompt, options


def demonstrated(task: Task, rows: Rows) -> DemonstratedTask:
    """The task with these rows, each with its right option, before every prompt.

    Raises:
        ValueError: naming the row, for a label outside the options.
    """
    parts = []
    for index, row in enumerate(rows):
        try:
            prompt, options = task.render(row)
            parts.append(prompt + options[task.answer(row)] + SEPARATOR)
        except ValueError as error:
            raise ValueError(f"{rows.where(index)}: {error}") from None
    return DemonstratedTask(**{each.name: getattr(task, each.name) for each in fields(Task)}, preamble="".join(parts))
