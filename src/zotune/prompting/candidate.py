"""A candidate of the search, a template with one label word for each class, and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zotune.io.suggest import did_you_mean
from zotune.io.text import shown
from zotune.tasks import Task, load
from zotune.tasks.task import MASK
from zotune.tasks.template import columns_of


@dataclass(frozen=True)
class Candidate:
    """A prompt template and the text of each option, in label order."""

    prompt: str
    options: tuple[str, ...]


def check_task(task: Task) -> None:
    """ValueError for a task whose answers are texts of the row: it has no label words."""
    if task.gold:
        raise ValueError(f"task {task.name!r} has no options: its answers are texts of each row, and `zotune prompt` scores label words.")


def check_prompt(prompt: str, task: Task, *, masked: bool) -> None:
    """ValueError for a template that is malformed, or names no column or an unknown one, or has a mask too many or too few.

    Args:
        prompt: the template.
        task: its columns, and those derived from them, may be named; the label may not.
        masked: whether a masked language model reads it.
    """
    known = [*task.columns, *task.derived]
    columns = columns_of(prompt)
    for column in columns:
        if column not in known:
            raise ValueError(
                f"the template {shown(prompt)} names {column!r}, which is no column of task {task.name!r}"
                f"{did_you_mean(column, known)}: there are {', '.join(known)}."
            )
    if not columns:
        raise ValueError(f"the template {shown(prompt)} names no column, so every row would have the same prompt: write {{{known[0]}}}.")
    count = prompt.count(MASK)
    if masked and count != 1:
        raise ValueError(f"the template {shown(prompt)} has {count} of {MASK}, and a masked language model fills one: write it once.")
    if not masked and count:
        raise ValueError(f"the template {shown(prompt)} has a {MASK}, and this is no masked language model: leave it out.")


def as_task(source: str | Path, task: Task, candidate: Candidate, *, masked: bool) -> Task:
    """The task of ``source`` with a candidate's prompt and options; ValueError for an invalid candidate."""
    check_prompt(candidate.prompt, task, masked=masked)
    return load(source, template=candidate.prompt, options=list(candidate.options))


def option_text(word: str, prompt: str, *, masked: bool) -> str:
    """A label word as the option behind a prompt: with a blank before it, but not at the start of a line.

    Example:
        >>> option_text("great", "{sentence} It was", masked=False)
        ' great'
    """
    if word[:1].isspace():
        return word
    return word if prompt.endswith("\n") and not masked else f" {word}"


def options_of(words: Sequence[str], prompt: str, task: Task, *, masked: bool) -> tuple[str, ...]:
    """The options of label words behind a prompt; those with columns of the row stay as they are."""
    return tuple(words) if not task.fixed_options else tuple(option_text(word, prompt, masked=masked) for word in words)
