"""Regular expressions of files and options, matched within limits of time and memory."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zotune.io.limited import Limited
from zotune.io.text import shown

#: Most characters of a pattern, and most patterns.
LONGEST, MOST = 1000, 100_000


def check(patterns: Sequence[str], where: str) -> None:
    """ValueError for what is no pattern, or has more than :data:`LONGEST` characters; or for more than :data:`MOST` patterns."""
    if len(patterns) > MOST:
        raise ValueError(f"{where} has {len(patterns)} regular expressions, and at most {MOST} are possible.")
    for pattern in patterns:
        if not isinstance(pattern, str) or len(pattern) > LONGEST:
            raise ValueError(f"{where}: {shown(pattern)} is not a regular expression of at most {LONGEST} characters.")
    with Limited(_compile, where) as compiled:
        compiled(list(patterns), where)


def matching(patterns: Sequence[str], names: Sequence[str], where: str) -> list[str]:
    """The names that any of the patterns is found in.

    Raises:
        ValueError: no pattern, or one that takes too long to match (``(a+)+$`` on a long name takes years).

    Example:
        >>> matching(["b$", "^c"], ["ab", "ba", "ca"], "--trainable")
        ['ab', 'ca']
    """
    check(patterns, where)
    with Limited(_matching, where) as matched:
        return matched(list(patterns), list(names))


def rehearse(patterns: Sequence[str], names: Sequence[str], where: str) -> None:
    """ValueError where matching any of the names from its beginning, as a library will, takes too long, or where one is no pattern."""
    check(patterns, where)
    with Limited(_rehearsed, f"the regular expressions of {where}") as rehearsed:
        rehearsed(list(patterns), list(names))


def _compile(patterns: list[str], where: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{where} {shown(pattern)} is not a regular expression: {error}.") from None


def _matching(patterns: list[str], names: list[str]) -> list[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if any(pattern.search(name) for pattern in compiled)]


def _rehearsed(patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        compiled = re.compile(pattern)
        for name in names:
            compiled.match(name)
