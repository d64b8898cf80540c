"""Built-in reward functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zotune.io.text import shown
from zotune.rewards.calls import RewardFunction, RewardRequestError
from zotune.tasks import metrics

#: Columns that hold the right answer, in the order in which they are looked for.
ANSWER_COLUMNS = ("reference", "answer", "solution", "label")


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    return completion if isinstance(completion, str) else "".join(str(message.get("content") or "") for message in completion)


class AgainstAnswers:
    """reward = score(text, right answers), from a column that holds a text, a number or a list of them a row.

    Args:
        name: of the function, for messages.
        score: of a text and its right answers; None for a row that it does not judge.
        column: the first of ``ANSWER_COLUMNS`` that the data have by default.
    """

    def __init__(self, name: str, score: Callable[[str, list[str]], float | None], column: str = "") -> None:
        self.__name__, self.score, self.column = name, score, column

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Rewards; None for a row without an answer."""
        wanted = (self.column,) if self.column else ANSWER_COLUMNS
        column = next((name for name in wanted if name in columns), None)
        if column is None:
            raise RewardRequestError(
                f"the reward {self.__name__!r} compares with a column named {' or '.join(map(repr, wanted))}, and the data have none: "
                f"rename yours, or name it as in '{self.__name__}:my_column'."
            )
        return [self._one(text_of(each), answer) for each, answer in zip(completions, columns[column], strict=True)]

    def _one(self, text: str, answer: Any) -> float | None:
        answers = [answer] if isinstance(answer, str | int | float) else answer
        if answers is None or len(answers) == 0:
            return None
        if not all(isinstance(each, str | int | float) for each in answers):
            raise ValueError(f"the right answer {shown(answer)} is neither a text nor a number nor a list of them")
        return self.score(text, [str(each) for each in answers])


def exact_match(option: str) -> RewardFunction:
    """1 where the normalized text is a right answer's, else 0; the option names the column (1606.05250)."""
    return AgainstAnswers("exact_match", metrics.exact_match, option)


def token_f1(option: str) -> RewardFunction:
    """F1 of the bags of normalized words of text and right answer; the option names the column (1606.05250)."""
    return AgainstAnswers("token_f1", metrics.token_f1, option)


_FACTORIES: dict[str, Callable[[str], RewardFunction]] = {"exact_match": exact_match, "token_f1": token_f1}
#: Names of the built-in functions.
NAMES = tuple(_FACTORIES)


def builtin(name: str) -> RewardFunction | None:
    """The built-in function of a name and its option behind a colon, or None.

    Raises:
        ValueError: the option is missing or wrong.
    """
    kind, _, option = name.partition(":")
    return _FACTORIES[kind](option) if kind in _FACTORIES else None
