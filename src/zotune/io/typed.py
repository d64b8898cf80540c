"""JSON of a file as the fields of a dataclass: every value has the type that its annotation says."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from zotune.io.text import shown

T = TypeVar("T")


def read_fields(kind: type[T], content: Any, source: str | Path, *, unknown: bool = True, remedy: str = "") -> T:
    """A dataclass of the entries of a JSON object.

    Args:
        kind: the dataclass. Its annotations may be of plain types, None, ``Literal``, unions, lists, dicts and other dataclasses.
        content: of the file.
        source: the file, for messages.
        unknown: whether entries that are no fields are left out; else they are refused.
        remedy: a clause after the message, with what to do.

    Raises:
        ValueError: no object, an entry is missing, or has another type.
    """
    end = f": {remedy}." if remedy else "."
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} is damaged, it holds no object{end}")
    hints = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    extra = [] if unknown else sorted(map(str, set(content) - set(known)))
    if extra:
        raise ValueError(f"{source} is damaged, {extra[0]!r} is no entry of it{end}")
    values = {}
    for name, field in known.items():
        if name not in content:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{source} is damaged, it has no {name!r}{end}")
            continue
        if not fits(content[name], hints[name]):
            raise ValueError(f"{source} is damaged, its {name!r} is none ({shown(content[name], 40)}){end}")
        values[name] = _made(content[name], hints[name])
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has the type of an annotation; an int is a float too, a bool is no int."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple):
        return isinstance(value, list) and (not arguments or all(fits(each, arguments[0]) for each in value))
    if origin is dict or origin is Mapping:
        return isinstance(value, dict) and all(isinstance(key, str) and fits(each, arguments[1]) for key, each in value.items())
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict) and _of_dataclass(value, hint)
    return isinstance(value, hint)


def is_like(value: Any, sample: Any) -> bool:
    """Whether a value of JSON has the types of a sample: the same keys, numbers for numbers; anything where the sample has None."""
    if sample is None:
        return True
    if isinstance(sample, bool | str):
        return type(value) is type(sample)
    if isinstance(sample, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(sample, Mapping):
        return isinstance(value, Mapping) and all(name in value and is_like(value[name], each) for name, each in sample.items())
    if isinstance(sample, list | tuple):
        return isinstance(value, list | tuple) and (not sample or all(is_like(each, sample[0]) for each in value))
    return True


def are_groups(value: Any) -> bool:
    """Whether a value is the parameter groups of an optimizer, whose rates are numbers."""
    kinds = (str, list, dict, bool, type(None))
    return isinstance(value, list | tuple) and all(
        isinstance(group, Mapping) and not any(isinstance(group.get(name, 0.0), kinds) for name in ("lr", "weight_decay", "initial_lr"))
        for group in value
    )


def _of_dataclass(value: Mapping[str, Any], kind: Any) -> bool:
    try:
        read_fields(kind, value, "")
    except (ValueError, TypeError):
        return False
    return True


def _made(value: Any, hint: Any) -> Any:
    """The value with dataclasses for objects."""
    arguments = get_args(hint)
    if isinstance(value, list) and get_origin(hint) is list and arguments:
        return [_made(each, arguments[0]) for each in value]
    if isinstance(value, dict):
        for each in (hint, *arguments):
            if dataclasses.is_dataclass(each) and isinstance(each, type):
                return read_fields(each, value, "")
    return value
