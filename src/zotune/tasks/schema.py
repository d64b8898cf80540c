"""The keys of a task file and the types of their values: :func:`check`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zotune.io.inside import is_inside
from zotune.io.suggest import did_you_mean
from zotune.io.text import shown

#: Most derived columns, and most changes of one.
MOST_RULES = 100


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _by_text(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_text(key) and of(each) for key, each in value.items())


def _inside(value: Any) -> bool:
    """A name within the data folder: a task file of somebody else's must not read other folders."""
    return is_inside(value) and ":" not in value


def _scalars(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_scalar, [*value, *value.values()]))


def _options(value: Any) -> bool:
    return _scalars(value) or _text(value) or (isinstance(value, list) and all(map(_scalar, value)))


def _derived(rule: Any) -> bool:
    if not isinstance(rule, dict):
        return False
    if any(isinstance(rule.get(key), dict | list) and len(rule[key]) > MOST_RULES for key in ("apply", "replace")):
        return False
    shapes = {"column": _text, "map": _by_text(_text), "apply": _texts, "replace": _by_text(_text)}
    return all(key not in rule or fits(rule[key]) for key, fits in shapes.items())


_NAME = "a name without '..', ':' or a leading '/'"
SHAPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_inside, _NAME),
    "title": (_text, "a text"),
    "hub": (_inside, "the id of a data set on the hub"),
    "subset": (_text, "a text"),
    "splits": (_by_text(_inside), f"a mapping from train and eval to {_NAME}"),
    "files": (_by_text(_inside), f"a mapping from train and eval to {_NAME}"),
    "columns": (_texts, "a list of names"),
    "derived": (
        lambda value: _by_text(_derived)(value) and len(value) <= MOST_RULES,
        "a mapping of (at most 100) new columns to {column: ..., map: ...}, {..., apply: ...} or {..., replace: ...}",
    ),
    "encoder": (_texts, "a list of one template or two"),
    "label": (_text, "a column's name"),
    "labels": (_scalars, "a mapping"),
    "drop_labels": (lambda value: isinstance(value, list) and all(map(_scalar, value)), "a list of labels"),
    "answers": (lambda value: _text(value) or _texts(value), "a column's name, or a list of a column's and its fields'"),
    "candidates": (_text, "a column's name"),
    "max_new_tokens": (lambda value: isinstance(value, int) and value >= 1, "a number of tokens, 1 or more"),
    "template": (_text, "a template's name"),
    "templates": (lambda value: isinstance(value, dict) and all(map(_text, value)), "a mapping"),
    "options": (_options, "a list of texts, or a mapping from labels to texts"),
    "answer": (_text, "a text"),
    "length_normalize": (lambda value: isinstance(value, bool), "true or false"),
    "metrics": (_texts, "a list of names"),
    "citation": (_text, "a text"),
}


def check(raw: Mapping[str, Any]) -> None:
    """ValueError for the first unknown key or value of a wrong type; null is the same as no key."""
    for key in raw:
        if key not in SHAPES:
            raise ValueError(f"unknown key {shown(key)}{did_you_mean(key, SHAPES)}.")
    for key, (fits, wanted) in SHAPES.items():
        if raw.get(key) is not None and not fits(raw[key]):
            raise ValueError(f"{key!r} must be {wanted}.")
    for name, entry in (raw.get("templates") or {}).items():
        if isinstance(entry, dict) and not (_options(entry.get("options") or []) and _text(entry.get("answer") or "")):
            raise ValueError(f"template {name!r} needs options that are texts.")
