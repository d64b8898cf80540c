"""What each key of a task file may hold: :func:`check`, before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _by_text(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_text(key) and of(each) for key, each in value.items())


def _inside(value: Any) -> bool:
    """A name that leads to no other folder: the rows of a task from elsewhere come from the folder that its user names."""
    return _text(value) and not value.startswith(("/", "\\", "~")) and ":" not in value and ".." not in value.replace("\\", "/").split("/")


def _options(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_scalar, value)) and all(map(_scalar, value.values()))
    return _text(value) or (isinstance(value, list) and all(map(_scalar, value)))


def _derived(rule: Any) -> bool:
    if not isinstance(rule, dict):
        return False
    shapes = {"column": _text, "map": _by_text(_text), "apply": _texts, "replace": _by_text(_text)}
    return all(key not in rule or fits(rule[key]) for key, fits in shapes.items())


_NAME = "a name without '..', ':' or a leading '/'"
_SHAPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_inside, _NAME),
    "title": (_text, "a text"),
    "hub": (_inside, "the id of a data set on the hub"),
    "subset": (_text, "a text"),
    "splits": (_by_text(_inside), f"a mapping from train and eval to {_NAME}"),
    "files": (_by_text(_inside), f"a mapping from train and eval to {_NAME}"),
    "columns": (_texts, "a list of names"),
    "derived": (_by_text(_derived), "a mapping of new columns to {column: ..., map: ...}, {..., apply: ...} or {..., replace: ...}"),
    "encoder": (_texts, "a list of one template or two"),
    "label": (_text, "a column's name"),
    "labels": (lambda value: isinstance(value, dict) and all(map(_scalar, value)) and all(map(_scalar, value.values())), "a mapping"),
    "drop_labels": (lambda value: isinstance(value, list) and all(map(_scalar, value)), "a list of labels"),
    "answers": (lambda value: _text(value) or _texts(value), "a column's name, or a list of a column's and its fields'"),
    "candidates": (_text, "a column's name"),
    "template": (_text, "a template's name"),
    "templates": (lambda value: isinstance(value, dict) and all(map(_text, value)), "a mapping"),
    "options": (_options, "a list of texts, or a mapping from labels to texts"),
    "answer": (_text, "a text"),
    "metrics": (_texts, "a list of names"),
    "citation": (_text, "a text"),
}


def check(raw: Mapping[str, Any]) -> None:
    """ValueError for the first key that holds what it cannot; null is the same as no key."""
    for key, (fits, wanted) in _SHAPES.items():
        if raw.get(key) is not None and not fits(raw[key]):
            raise ValueError(f"{key!r} must be {wanted}.")
    for name, entry in (raw.get("templates") or {}).items():
        if isinstance(entry, dict) and not (_options(entry.get("options") or []) and _text(entry.get("answer") or "")):
            raise ValueError(f"template {name!r} needs options that are texts.")
