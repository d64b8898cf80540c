"""A task with another default template, as a YAML file that every command takes as `--task`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zotune.io.atomic import write_text
from zotune.prompting.candidate import Candidate
from zotune.tasks import Task
from zotune.tasks.loader import load, read

#: Name of the template that a search found.
FOUND = "found"


def write_task(path: Path, source: str | Path, task: Task, candidate: Candidate, note: str) -> None:
    """Writes the task of ``source`` with a candidate as its default template, beside the task's own.

    Args:
        path: of the new file.
        source: name or path of the task.
        task: the same, loaded.
        candidate: prompt and options.
        note: a comment at the beginning of the file.

    Raises:
        ValueError: the file would not read as this task.
    """
    content: dict[str, Any] = dict(read(source))
    options = dict(zip(task.labels, candidate.options, strict=True))
    templates = {FOUND: {"prompt": candidate.prompt, "options": options}}
    templates |= {name: entry for name, entry in content["templates"].items() if name != FOUND}
    content |= {"template": FOUND, "templates": templates}
    comment = "".join(f"# {line}\n" for line in note.splitlines())
    write_text(path, comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=130))
    again = load(path)
    if (again.prompt, again.options) != (candidate.prompt, candidate.options):
        raise ValueError(f"{path} does not read as the template {candidate.prompt!r} that it was written for.")
