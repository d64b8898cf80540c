"""Built-in reward functions by name, and those that look at the completion alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from zotune.rewards.answers import bleu, exact_match, math_verify, text_of, token_f1
from zotune.rewards.calls import RewardFunction, RewardRequestError


class OfText:
    """reward = score(text).

    Args:
        name: of the function, for messages.
        score: of a text.
    """

    def __init__(self, name: str, score: Callable[[str], float]) -> None:
        self.__name__, self.score = name, score

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        """Rewards."""
        return [float(self.score(text_of(each))) for each in completions]


def contains(text: str) -> RewardFunction:
    """1 where the completion contains a text, case included, else 0."""
    if not text:
        raise ValueError("the reward 'contains' needs a text, as in 'contains:TEXT'.")
    return OfText("contains", lambda completion: text in completion)


def regex(pattern: str) -> RewardFunction:
    """1 where a regular expression of Python is found in the completion, else 0.

    Raises:
        ValueError: the pattern is empty or wrong.
    """
    if not pattern:
        raise ValueError("the reward 'regex' needs a pattern, as in 'regex:[0-9]+'.")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the reward 'regex' needs a regular expression, and {pattern!r} is none: {error}.") from None
    return OfText("regex", lambda completion: compiled.search(completion) is not None)


def characters(wanted: int | str) -> RewardFunction:
    """min(n, N) / max(n, N) for a completion of n characters: 1 at N, and nowhere flat."""
    number = _length("characters", wanted)
    return OfText("characters", lambda completion: _closeness(len(completion), number))


def length(wanted: int | str) -> RewardFunction:
    """min(n, N) / max(n, N) for a completion of n tokens: 1 at N, and nowhere flat."""
    number = _length("length", wanted)

    def length(completions: list[Any], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any) -> list[float]:
        if completion_ids is None:
            raise RewardRequestError("the reward 'length' counts tokens, and there are none here: use 'characters:N'.")
        return [_closeness(len(each), number) for each in completion_ids]

    return length


def _length(name: str, wanted: int | str) -> int:
    if not str(wanted).strip().isdecimal() or int(wanted) < 1:
        raise ValueError(f"the reward {name!r} needs a length of at least 1, as in '{name}:20', and not {str(wanted)!r}.")
    return int(wanted)


def _closeness(found: int, wanted: int) -> float:
    return min(found, wanted) / max(found, wanted)


_FACTORIES: dict[str, Callable[[str], RewardFunction]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "bleu": bleu,
    "math_verify": math_verify,
    "contains": contains,
    "regex": regex,
    "length": length,
    "characters": characters,
}
#: Names of the built-in functions.
NAMES = tuple(_FACTORIES)


def builtin(name: str) -> RewardFunction | None:
    """The built-in function of a name and its option behind a colon, or None.

    Raises:
        ValueError: the option is missing or wrong, or a package is missing.
    """
    kind, _, option = name.partition(":")
    return _FACTORIES[kind](option) if kind in _FACTORIES else None
