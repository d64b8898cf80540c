"""Plain data from untrusted YAML: :func:`parse`."""

from __future__ import annotations

from typing import Any

import yaml

#: Most values of a document with its aliases expanded: a few lines of nested aliases can stand for billions.
MOST_VALUES = 100_000


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
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"{source}: this holds more than {MOST_VALUES} values (aliases written out).")
        try:
            return loader.construct_document(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a value that does not fit its tag, such as !!timestamp x or 2023-99-99
            raise ValueError(f"{source}: a value is not what its form or tag says ({' '.join(str(error).split())}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{source}{where}: this is not YAML ({problem}).") from None
    except RecursionError:
        raise ValueError(f"{source}: this is nested too deeply.") from None
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values below a node, with aliases expanded; more than the limit for a recursive one."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # the count of a recursive node, which is found again from below
        children = [part for item in node.value for part in item] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]
