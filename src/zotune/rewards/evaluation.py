"""Evaluation by rewards: the completions of a batch at the weights as they are, and the metrics of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zotune.rewards.objective import RewardLoss

#: Columns of a table of evaluated prompts before those of the functions.
COLUMNS = ("reward", "completion_length")


def metric_names(functions: Sequence[str]) -> tuple[str, ...]:
    """The columns that are metrics: those of single functions where there are several."""
    return (*COLUMNS, *(f"reward_{name}" for name in functions)) if len(functions) > 1 else COLUMNS


class Shown(NamedTuple):
    """A completion to show.

    Attributes:
        number: of its prompt in the data.
        prompt: a text or messages.
        completion: the text.
        length: its tokens.
        rewards: by metric, the total first; None where one failed.
    """

    number: int
    prompt: Any
    completion: str
    length: int
    rewards: dict[str, float | None]


def evaluated(loss: RewardLoss, batch: Mapping[str, Any]) -> tuple[Tensor, list[Shown]]:
    """The table of a batch of prompts, (B, 2 + functions), float32, and their completions.

    Its columns are the reward, the tokens of the completion, and the reward by each function; NaN where one failed.

    Args:
        loss: of one completion a prompt.
        batch: of prompts.
    """
    scored = loss.scored(batch)
    by_function = scored.scores.by_function
    table = np.stack([scored.scores.total, scored.lengths.astype(np.float64), *by_function.values()], axis=1)
    names = metric_names(list(by_function))
    shown = []
    for row, number, text, values in zip(batch["rows"], batch["prompt_number"].tolist(), scored.texts, table.tolist(), strict=True):
        known = dict(zip(names, values, strict=False))
        length = int(known.pop("completion_length"))
        rewards = {name: value if np.isfinite(value) else None for name, value in known.items()}
        shown.append(Shown(number, row["prompt"], text, length, rewards))
    return torch.from_numpy(table).float(), shown


@dataclass(frozen=True)
class RewardMetrics:
    """Callable for ``transformers.Trainer(compute_metrics=...)``: the table of :func:`evaluated` → means over prompts.

    Attributes:
        functions: names of the reward functions.
    """

    functions: Sequence[str]

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics."""
        return metric_names(self.functions)

    def __call__(self, prediction: Any) -> dict[str, float]:
        table = np.asarray(prediction.predictions, dtype=np.float64)
        found = {name: _mean(table[:, index]) for index, name in enumerate(self.names)}
        failed = int(np.isnan(table[:, 0]).sum())
        return {**found, "failed_rewards": float(failed)} if failed else found


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
