"""A classification task from rows with a text and a label, without a task file: the values of the label are the options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zotune.tasks.rows import Rows
from zotune.tasks.template import columns_of

TEXT, LABEL = "text", "label"
#: Most classes.
MOST = 1000
#: How a name of a column may read in a prompt.
_WORDS = re.compile(r"[A-Za-z][A-Za-z ]{0,30}")


def is_labeled(rows: Rows, template: str | None = None) -> bool:
    """Whether rows have a label, and a text or what a template names."""
    columns = set(rows.columns)
    return LABEL in columns and bool(TEXT in columns or (template is not None and "{" in template))


def task_of(rows: Rows, name: str, cue: str = LABEL, template: str | None = None) -> dict[str, Any]:
    """The content of a task file (docs/how-to/add_task.md) for rows with a label.

    Its prompt is the text, and on a new line the ``cue``. Classes are in the order of a data set's ClassLabel, else sorted.

    Args:
        rows: all that are trained on.
        name: of the file or data set.
        cue: the label's column in the data.
        template: a prompt of the user's own, for the columns that it names.

    Raises:
        ValueError: a label that is missing, or no class; too many classes, or one alone. The message names the row.
    """
    classes = _classes(rows)
    cue = cue.replace("_", " ").replace("-", " ").strip()
    cue = cue.capitalize() if _WORDS.fullmatch(cue) else "Label"
    columns = list(columns_of(template)) if template is not None and "{" in template else [TEXT]
    options = {value: " " + _escaped(text) for value, text in classes.items()}
    return {
        "name": re.sub(r"[^\w.-]+|\.\.+", "-", Path(name).name.partition(".")[0]).strip("-.") or "labels",
        "title": f"the column {LABEL} of {name}",
        "columns": [column for column in columns if column != LABEL] or [TEXT],
        "label": LABEL,
        "labels": classes,
        "templates": {"plain": {"prompt": f"{{{columns[0] if TEXT not in columns else TEXT}}}\n{cue}:", "options": options}},
        "metrics": ["accuracy", "f1"],
    }


def _classes(rows: Rows) -> dict[Any, str]:
    """The values of the label, and their names."""
    names = getattr((getattr(rows.rows, "features", None) or {}).get(LABEL), "names", None)
    found: dict[Any, None] = {}
    alike: dict[str, str] = {}

    def note(row: Mapping[str, Any]) -> None:
        value = row.get(LABEL)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"column {LABEL!r} is empty: write the row's label, or leave the row out.")
        if not isinstance(value, str | int):
            raise ValueError(f"column {LABEL!r} holds {_shown(value)}, which is no class: a name or a whole number is.")
        if any(isinstance(value, str) is not isinstance(other, str) for other in found):
            raise ValueError(f"column {LABEL!r} holds {_shown(value)}, and other rows {_shown(next(iter(found)))}: write all labels alike.")
        if isinstance(value, str) and alike.setdefault(" ".join(value.split()).casefold(), value) != value:
            other = alike[" ".join(value.split()).casefold()]
            raise ValueError(f"column {LABEL!r} holds {value!r}, and other rows {other!r}: write them alike, or make them differ more.")
        found[value] = None
        if len(found) > MOST:
            raise ValueError(
                f"column {LABEL!r} has more than {MOST} different values up to here, so it holds no classes: name the right column as "
                "--columns label=COLUMN; --columns label= trains on the texts alone."
            )

    rows.map(note)
    if names is not None:
        return {number: str(name) for number, name in enumerate(names)}
    if len(found) < 2:
        raise ValueError(f"{rows.source}: column {LABEL!r} holds {_shown(next(iter(found)))} in every row, and classes are two or more.")
    return {value: str(value).strip() for value in sorted(found)}


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
