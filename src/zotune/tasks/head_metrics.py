"""Metrics of numbers and of several labels, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zotune.tasks.metrics import METRICS, predictions
from zotune.tasks.model_kind import MULTI, REGRESSION


def pearson(predicted: np.ndarray, values: np.ndarray) -> float:
    """Correlation of (N,) and (N,), or its mean over the columns of (N, C); 0 where one of them is constant."""
    predicted, values = (np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in (predicted, values))
    x, y = predicted - predicted.mean(axis=0), values - values.mean(axis=0)
    lengths = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return float(np.mean(np.divide((x * y).sum(axis=0), lengths, out=np.zeros_like(lengths), where=lengths > 0)))


def spearman(predicted: np.ndarray, values: np.ndarray) -> float:
    """The same of ranks; equal numbers share the mean of their ranks."""
    columns = [np.asarray(part, dtype=np.float64).reshape(len(part), -1).T for part in (predicted, values)]
    return float(np.mean([pearson(_ranks(x), _ranks(y)) for x, y in zip(*columns, strict=True)]))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def mse(predicted: np.ndarray, values: np.ndarray) -> float:
    """Mean of the squared differences."""
    predicted, values = (np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in (predicted, values))
    return float(np.mean((predicted - values) ** 2))


def micro_f1(predicted: np.ndarray, values: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) over all examples and labels, (N, C) of 0 and 1; 0 where there are none."""
    total = np.sum(predicted) + np.sum(values)
    return float(2 * np.sum(predicted * values) / total) if total else 0.0


def macro_f1(predicted: np.ndarray, values: np.ndarray) -> float:
    """Mean of the labels' F1, over labels that occur in either array."""
    present = (np.sum(predicted, axis=0) + np.sum(values, axis=0)) > 0
    found = [micro_f1(predicted[:, column], values[:, column]) for column in np.flatnonzero(present)]
    return float(np.mean(found)) if found else 0.0


_OF_NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"pearson": pearson, "spearman": spearman, "mse": mse}
_OF_LABELS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"micro_f1": micro_f1, "macro_f1": macro_f1}


@dataclass(frozen=True)
class ComputeHeadMetrics:
    """Callable for ``transformers.Trainer(compute_metrics=...)``: a head's outputs (N, C) and labels -> named floats.

    Attributes:
        problem: as transformers names it. A label of several is predicted where its logit is above 0, its probability above one half.
        metrics: names, the main one first.
    """

    problem: str
    metrics: Sequence[str]

    def __call__(self, prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions
        outputs, labels = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs), np.asarray(prediction.label_ids)
        if self.problem == REGRESSION:
            return {name: _OF_NUMBERS[name](outputs, labels) for name in self.metrics}
        if self.problem == MULTI:
            return {name: _OF_LABELS[name]((outputs > 0).astype(np.float64), labels) for name in self.metrics}
        return {name: METRICS[name](predictions(outputs), labels.reshape(-1)) for name in self.metrics}
