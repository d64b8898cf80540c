"""Plain data from untrusted YAML: :func:`parse`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from zotune.io.text import read_text, shortened

#: Most values of a document with its aliases expanded: a few lines of nested aliases can stand for billions.
MOST_VALUES = 20_000
#: Most bytes of a file.
LONGEST_FILE = 1 << 20
#: Most characters of a number: one in base 60 (1:30:00) takes time that grows with the square.
LONGEST_NUMBER = 100

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Stops at the first value too many."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.values += 1
        if self.values > MOST_VALUES:
            raise _TooManyError
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


class _TooManyError(Exception):
    pass


def read(path: str | Path, source: object) -> Any:
    """:func:`parse` of a file; ValueError also for one that is too long or no text. OSError: it cannot be read."""
    return parse(read_text(path, LONGEST_FILE), source)


def parse(text: str, source: object) -> Any:
    """The content of a YAML document in dicts, lists, texts, numbers, booleans, dates and None; no other class, no code.

    Args:
        text: the document.
        source: the file, for messages.

    Raises:
        ValueError: it is not YAML, is nested too deeply, or is too large with its aliases expanded.

    Example:
        >>> parse("a: [1, 2]", "my.yaml")
        {'a': [1, 2]}
    """
    loader = None
    too_many = f"{source}: this holds more than {MOST_VALUES} values (aliases written out)."
    if len(text) > LONGEST_FILE:
        raise ValueError(f"{source}: this is longer than {LONGEST_FILE} characters.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise _TooManyError
        try:
            return loader.construct_document(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a value that does not fit its tag, such as !!timestamp x or 2023-99-99
            reason = shortened(" ".join(str(error).split()), 300)
            raise ValueError(f"{source}: a value is not what its form or tag says ({reason}).") from None
    except _TooManyError:
        raise ValueError(too_many) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = shortened(" ".join(str(getattr(error, "problem", None) or error).split()), 300)
        raise ValueError(f"{source}{where}: this is not YAML ({problem}).") from None
    except RecursionError:
        raise ValueError(f"{source}: this is nested too deeply.") from None
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values below a node, with aliases expanded; more than the limit for a recursive one."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise yaml.MarkedYAMLError(problem=f"a number of {len(node.value)} characters", problem_mark=node.start_mark)
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # the count of a recursive node, which is found again from below
        children = [part for item in node.value for part in item] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def number(value: Any) -> Any:
    """The value of a number with an exponent and without a point, such as `1e-6`, which YAML reads as a text; any other value as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
