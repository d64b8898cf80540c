"""Metrics of multiple-choice and classification predictions, in numpy."""

from __future__ import annotations

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


@dataclass(frozen=True)
class ComputeMetrics:
    """Callable for ``transformers.Trainer(compute_metrics=...)``: scores (N, C) and answers (N,) -> named floats.

    Takes an ``EvalPrediction`` or a pair (scores, answers).
    """

    metrics: Sequence[str] = ("accuracy",)

    def __call__(self, prediction: Any) -> dict[str, float]:
        scores, answers = (prediction.predictions, prediction.label_ids) if hasattr(prediction, "predictions") else prediction
        if isinstance(scores, tuple):
            scores = scores[0]
        predicted, answers = predictions(scores), np.asarray(answers).reshape(-1)
        return {name: METRICS[name](predicted, answers) for name in self.metrics}
