"""The columns of rows without a task: what each form of a row uses, ignores and refuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zotune.io.suggest import did_you_mean
from zotune.tasks import chat
from zotune.tasks.sources import Rows

#: Column sets of rows without a task, in order of precedence.
FORMATS = (("messages",), ("prompt", "completion"), ("text",))
#: Columns with an effect, by the first column of the form.
USED: Mapping[str, tuple[str, ...]] = {"messages": chat.COLUMNS, "prompt": ("prompt", "completion"), "text": ("text",)}
#: Columns that are known to say nothing on training: they are ignored without a word.
IGNORED: Mapping[str, tuple[str, ...]] = {"messages": ("parallel_tool_calls", "id"), "prompt": ("id",), "text": ("id",)}
#: Columns that are refused, with the fix.
REFUSED: Mapping[str, Mapping[str, str]] = {
    "messages": {
        "functions": "write the functions as 'tools'",
        "function_call": "write calls as 'tool_calls' of a message",
    },
    "prompt": {},
    "text": {},
}


def format_of(rows: Rows) -> tuple[str, ...]:
    """The column set of rows without a task; ValueError where they have none of :data:`FORMATS`."""
    present = set(rows.columns)
    for columns in FORMATS:
        if present.issuperset(columns):
            return columns
    # One column of a pair is there: name the other.
    known = [name for columns in FORMATS for name in columns]
    near = next((text for name in rows.columns if (text := did_you_mean(name, known))), "")
    if len(present & {"prompt", "completion"}) == 1:
        near = f"; the column {({'prompt', 'completion'} - present).pop()!r} is missing"
    if "conversations" in present:
        near = "; write 'conversations' as messages with role and content"
    raise ValueError(
        f"{rows.source} needs the columns prompt and completion, or text, or messages (or pass --task): "
        f"every row has {', '.join(rows.columns) or 'no column in common'}{near}."
    )


def unused(rows: Rows, columns: tuple[str, ...]) -> list[str]:
    """Columns of any row that have no effect, in order; ValueError for one that is refused."""
    form = columns[0]
    names: Iterable[str] = rows.columns if hasattr(rows.rows, "column_names") else (name for row in rows for name in row)
    found = list(dict.fromkeys(names))
    for name in REFUSED[form].keys() & set(found):
        if any(row.get(name) is not None for row in rows):
            raise ValueError(f"{rows.source} has the column {name!r}, which chat templates no longer read: {REFUSED[form][name]}.")
    return [name for name in found if name not in (*USED[form], *IGNORED[form])]
