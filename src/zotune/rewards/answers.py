"""Reward functions that compare a completion with the right answer of its row."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        score: of a text and its right answers.
        column: the first of ``ANSWER_COLUMNS`` that the data have by default.
    """

    def __init__(self, name: str, score: Callable[[str, Sequence[str]], float], column: str = "") -> None:
        self.__name__, self.score, self.column = name, score, column

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Rewards; None for a row without an answer."""
        column = self.check_columns(columns)
        return [self._one(text_of(each), answer) for each, answer in zip(completions, columns[column], strict=True)]

    def check_columns(self, columns: Iterable[str]) -> str:
        """The column of right answers; ValueError where there is none."""
        wanted = (self.column,) if self.column else ANSWER_COLUMNS
        known = set(columns)
        column = next((name for name in wanted if name in known), None)
        if column is None:
            raise RewardRequestError(
                f"the reward {self.__name__!r} compares with a column named {' or '.join(map(repr, wanted))}, and the data have none: "
                f"rename yours, or name it as in '{self.__name__}:my_column'."
            )
        return column

    def check_row(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has a right answer; ValueError where it is none."""
        return bool(self._answers(row[self.check_columns(row)]))

    def _one(self, text: str, answer: Any) -> float | None:
        answers = self._answers(answer)
        return self.score(text, answers) if answers else None

    def _answers(self, answer: Any) -> list[str]:
        answers = [answer] if isinstance(answer, str | int | float) else [] if answer is None else answer
        if not isinstance(answers, list | tuple) or not all(isinstance(each, str | int | float) for each in answers):
            raise ValueError(f"the right answer {shown(answer)} is neither a text nor a number nor a list of them")
        return [str(each) for each in answers]


def exact_match(column: str = "") -> RewardFunction:
    """1 where the normalized text is a right answer's, else 0 (1606.05250)."""
    return AgainstAnswers("exact_match", metrics.exact_match, column)


def token_f1(column: str = "") -> RewardFunction:
    """F1 of the bags of normalized words of text and right answer, the best over answers (1606.05250)."""
    return AgainstAnswers("token_f1", metrics.token_f1, column)


def bleu(column: str = "") -> RewardFunction:
    """Smoothed BLEU-4 of one text, :func:`sentence_bleu`."""
    return AgainstAnswers("bleu", sentence_bleu, column)


def math_verify(column: str = "") -> RewardFunction:
    """1 where the last formula or number of the text equals a right answer mathematically, else 0.

    An answer that is no formula is compared as text. A comparison that takes more than 5 s is 0 (in the main thread; elsewhere there is
    no limit). Source: https://github.com/huggingface/Math-Verify

    Raises:
        ValueError: the package is not installed.
    """
    try:
        import math_verify as package
    except ImportError:
        raise ValueError("the reward 'math_verify' needs a package: pip install 'zotune[math]'.") from None

    def score(text: str, answers: Sequence[str]) -> float:
        # Its limit is an alarm, which only the main thread can set; elsewhere it would find nothing.
        limit = 5 if threading.current_thread() is threading.main_thread() else None
        found = package.parse(text, parsing_timeout=limit)
        for answer in answers:
            right = package.parse(_formula(answer), parsing_timeout=limit)
            if package.verify(right, found, timeout_seconds=limit) if right else metrics.exact_match(text, [answer]):
                return 1.0
        return 0.0

    return AgainstAnswers("math_verify", score, column)


def _formula(answer: str) -> str:
    """An answer between dollar signs if it is a bare formula: without delimiters and without a word."""
    bare = not re.search(r"\$|\\boxed|\\\(|\\\[|####|\n|(?<![\\A-Za-z])[A-Za-z]{3,}", answer)
    return f"${answer}$" if bare else answer


def sentence_bleu(text: str, references: Sequence[str]) -> float:
    """BLEU+1 = min(1, exp(1 − r/c)) · (Π_{n ≤ 4} p_n)^{1/4}, p_n = (matches + [n > 1]) / (n-grams + [n > 1]).

    Words and punctuation marks are tokens, case counts, r is the length of the reference nearest in length.
    Source: Lin and Och 2004, ORANGE (C04-1072).
    """
    words, right = _words(text), [_words(each) for each in references]
    if not words:
        return 0.0
    product = 1.0
    for n in range(1, 5):
        counts, plus = _grams(words, n), int(n > 1)
        most: Counter[tuple[str, ...]] = Counter()
        for each in right:
            most |= _grams(each, n)
        product *= ((counts & most).total() + plus) / (counts.total() + plus)
    nearest = min((len(each) for each in right), key=lambda length: (abs(length - len(words)), length))
    return min(1.0, math.exp(1 - nearest / len(words))) * product**0.25


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
