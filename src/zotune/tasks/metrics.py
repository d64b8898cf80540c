"""Metrics of chosen options and of generated answers, in numpy."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def predictions(scores: np.ndarray) -> np.ndarray:
    """Index of the best score of each row, (N, C) -> (N,); -1, never right, for a row with a NaN."""
    scores = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(axis=1))


def accuracy(predicted: np.ndarray, answers: np.ndarray) -> float:
    """Share of right answers."""
    return float(np.mean(np.asarray(predicted) == np.asarray(answers)))


def macro_f1(predicted: np.ndarray, answers: np.ndarray) -> float:
    """Unweighted mean of the classes' F1 = 2 TP / (2 TP + FP + FN), over classes that occur in either array."""
    predicted, answers = np.asarray(predicted), np.asarray(answers)
    classes = np.union1d(predicted[predicted >= 0], answers)
    return float(np.mean([_f1(predicted, answers, index) for index in classes]))


def binary_f1(predicted: np.ndarray, answers: np.ndarray) -> float:
    """F1 of class 1."""
    return _f1(np.asarray(predicted), np.asarray(answers), 1)


def _f1(predicted: np.ndarray, answers: np.ndarray, index: int) -> float:
    hits = np.sum((predicted == index) & (answers == index))
    total = np.sum(predicted == index) + np.sum(answers == index)
    return float(2 * hits / total) if total else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": macro_f1,
    "binary_f1": binary_f1,
}


def normalized(text: str) -> str:
    """An answer in SQuAD's normal form: lower case, no punctuation, no articles, single blanks (1606.05250)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the normalized answer is one of the references', else 0."""
    return float(any(normalized(answer) == normalized(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the bags of normalized words of answer and reference, the best over references; if one is empty, whether both are."""
    return max(_word_f1(normalized(answer).split(), normalized(reference).split()) for reference in references)


def _word_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    return 2 * sum((Counter(answer) & Counter(reference)).values()) / (len(answer) + len(reference))


#: Metrics of a generated answer and its references.
ANSWER_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "token_f1": token_f1,
    "exact_match": exact_match,
}


@dataclass(frozen=True)
class ComputeMetrics:
    """Callable for ``transformers.Trainer(compute_metrics=...)``: scores (N, C) and answers -> named floats.

    Takes an ``EvalPrediction`` or a pair (scores, answers). Answers are indices (N,), or (N, C) with 1 for every right option.
    """

    metrics: Sequence[str] = ("accuracy",)

    def answers(self, scores: np.ndarray) -> list[int | None]:
        """The option of each row of scores (N, C); None where there is none."""
        return [int(option) if option >= 0 else None for option in predictions(np.where(np.asarray(scores) == PADDING, -np.inf, scores))]

    def __call__(self, prediction: Any) -> dict[str, float]:
        scores, answers = _parts(prediction)
        predicted = predictions(np.where(np.asarray(scores) == PADDING, -np.inf, scores))
        if answers.ndim == 2:
            answers = _right_one(predicted, answers)
        answers = answers.reshape(-1)
        return {name: METRICS[name](predicted, answers) for name in self.metrics}


@dataclass(frozen=True)
class ComputeAnswerMetrics:
    """The same for generated answers: token ids (N, S), -100 for none, and indices into `references` (N,) -> means.

    An answer ends at its first line break, as demonstrations and training answers do.
    """

    decode: Callable[[Sequence[int]], str]
    references: Sequence[Sequence[str]]
    metrics: Sequence[str] = ("token_f1", "exact_match")

    def answers(self, tokens: np.ndarray) -> list[str | None]:
        """The answer of each row of token ids (N, S), in normal form; None where it is empty."""
        return [normalized(self.text(row)) or None for row in tokens]

    def __call__(self, prediction: Any) -> dict[str, float]:
        tokens, numbers = _parts(prediction)
        pairs = [(self.text(row), self.references[number]) for row, number in zip(tokens, numbers.reshape(-1), strict=True)]
        return {name: float(np.mean([ANSWER_METRICS[name](*pair) for pair in pairs])) for name in self.metrics}

    def text(self, tokens: Sequence[int]) -> str:
        """The answer of generated tokens."""
        return self.decode([int(token) for token in tokens if token != PADDING]).strip().partition("\n")[0].strip()


#: Padding of a Trainer where batches differ in width.
PADDING = -100


def majority(votes: Sequence[Sequence[Any]]) -> np.ndarray:
    """For each of N examples the first of K voters with the answer that most of them give, (N,), of equals the one given first.

    Args:
        votes: K times N answers; None is no vote.
    """
    found = []
    for answers in zip(*votes, strict=True):
        counts = Counter(answer for answer in answers if answer is not None)
        found.append(answers.index(counts.most_common(1)[0][0]) if counts else 0)
    return np.asarray(found, dtype=np.int64)


def _parts(prediction: Any) -> tuple[Any, np.ndarray]:
    found, answers = (prediction.predictions, prediction.label_ids) if hasattr(prediction, "predictions") else prediction
    return found[0] if isinstance(found, tuple) else found, np.asarray(answers)


def _right_one(predicted: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The predicted option where it is a right one, else the first right one: (N,), (N, C) -> (N,)."""
    hit = (predicted >= 0) & (right[np.arange(len(right)), predicted] == 1)
    return np.where(hit, predicted, (right == 1).argmax(axis=1))
