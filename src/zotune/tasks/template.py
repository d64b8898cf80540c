"""Prompt templates: plain ``{column}`` placeholders and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened, shown

# {{ and }} are literal braces; anything else in braces names a column.
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
#: Most characters of a template, and of a text made by one.
LONGEST_TEMPLATE, LONGEST_TEXT = 1 << 16, 1 << 22
_NAME = re.compile(r"\w[\w \-]*")


def render(template: str, row: Mapping[str, object]) -> str:
    """The template with every ``{column}`` replaced by that column's text, stripped of blanks at both ends.

    There is no attribute access, indexing, conversion or format specification.

    Raises:
        ValueError: for a malformed template, a column that the row lacks, or one that is null.

    Example:
        >>> render("{sentence} It was", {"sentence": " fun . "})
        'fun . It was'
    """

    length = len(template)

    def value(match: re.Match[str]) -> str:
        nonlocal length
        name = _column_of(match, template)
        text = match.group()[0] if name is None else text_of(row, name)
        length += len(text)
        check_length(length)
        return text

    return _TOKEN.sub(value, template)


def pieces(template: str, row: Mapping[str, object]) -> list[tuple[str | None, str]]:
    """What :func:`render` joins: (None, literal text) and (column, its text) in turn, a literal text first and last.

    Example:
        >>> pieces("{sentence} It was", {"sentence": " fun . "})
        [(None, ''), ('sentence', 'fun .'), (None, ' It was')]
    """
    found: list[tuple[str | None, str]] = []
    literal, end = "", 0
    for match in _TOKEN.finditer(template):
        literal, end, name = literal + template[end : match.start()], match.end(), _column_of(match, template)
        if name is None:
            literal += match.group()[0]
            continue
        found += [(None, literal), (name, text_of(row, name))]
        literal = ""
    found.append((None, literal + template[end:]))
    check_length(sum(len(text) for _, text in found))
    return found


def check_length(characters: int) -> None:
    """ValueError for a text of more characters than :data:`LONGEST_TEXT`."""
    if characters > LONGEST_TEXT:
        raise ValueError(f"the template makes a text of more than {LONGEST_TEXT} characters of this row: shorten the template.")


def columns_of(template: str) -> tuple[str, ...]:
    """The columns a template names, each once, in order; ValueError for a malformed template."""
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"a template has {len(template)} characters, and at most {LONGEST_TEMPLATE} are possible.")
    names = (_column_of(match, template) for match in _TOKEN.finditer(template))
    return tuple(dict.fromkeys(name for name in names if name is not None))


def text_of(row: Mapping[str, object], column: str) -> str:
    """One column of a row as stripped text."""
    if column not in row:
        raise ValueError(f"no column {shown(column)}: the row has {shortened(', '.join(row), 400)}{did_you_mean(column, row)}.")
    value = row[column]
    if value is None or isinstance(value, (dict, list)):
        raise ValueError(f"column {column!r} holds {'null' if value is None else type(value).__name__}, not text.")
    return str(value).strip()


def _column_of(match: re.Match[str], template: str) -> str | None:
    token = match.group()
    if token in ("{{", "}}"):
        return None
    if token in ("{", "}"):
        raise ValueError(f"template {shown(template)} has a lone {token!r}: write {token * 2!r} for the character itself.")
    name = match.group(1)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"template {shown(template)}: {shown(token)} is not a plain column name (no dots, indices or formats); "
            "write {column}, or {{ and }} for literal braces."
        )
    return name


def _parts_at_blank(text: str) -> tuple[str, str]:
    """A sentence before the word that holds its blank ``_``, and from that word on; ValueError without a blank."""
    before, blank, _ = text.partition("_")
    if not blank:
        raise ValueError(f"{shown(text)} has no blank: write _ where an option belongs.")
    kept = before.rpartition(" ")[0].rstrip(" ")
    return kept, text[len(kept) :].lstrip(" ")


def _lower_first(text: str) -> str:
    first, blank, rest = text.partition(" ")
    return text if first == "I" else first.lower() + blank + rest


#: Text changes for ``derived: <column>: {apply: [...]}``.
CHANGES: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "lower_first": _lower_first,
    "upper_first": lambda text: text[:1].upper() + text[1:],
    "question_mark": lambda text: text if text.endswith("?") else text + "?",
    "lower_first_letter": lambda text: text[:1].lower() + text[1:],
    "drop_last_character": lambda text: text[:-1],
    "drop_final_period": lambda text: text.removesuffix("."),
    "before_blank": lambda text: _parts_at_blank(text)[0],
    "from_blank": lambda text: _parts_at_blank(text)[1],
}
