"""What a run reports: its start, its result, and the events between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zotune.rewards.evaluation import Shown


@dataclass(frozen=True)
class RunStart:
    """A run, once model and data are loaded.

    Attributes:
        method: its title.
        model: folder or hub id.
        trainable, parameters: trained elements, and all.
        dtype, device: of the weights, and of the computation.
        data: its name.
        sizes: part of the data ("to train on", "held out", "to evaluate on") → examples.
        offload: where the blocks of an offloaded model are; None without offloading.
    """

    method: str
    model: str
    trainable: int
    parameters: int
    dtype: str
    device: str
    data: str
    sizes: dict[str, int]
    offload: str | None = None


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: of the run.
        summary: the contents of `summary.json`.
        history: the trainer's log entries.
    """

    folder: Path
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def before(self) -> dict[str, float] | None:
        """Metrics before training."""
        return self.summary["before"]

    @property
    def after(self) -> dict[str, float] | None:
        """Metrics after training."""
        return self.summary["after"]


class RunObserver:
    """Receives the events of a run on its first process; a subclass prints or records them."""

    def begin(self, start: RunStart) -> None:
        """Model and data are loaded."""

    def evaluated(self, when: str, metric: str, value: float) -> None:
        """An evaluation outside of training is complete; ``when``: "before training", for example."""

    def completions(self, step: int, shown: Sequence[Shown]) -> None:
        """A few completions of an evaluation, also of one during training."""

    def callbacks(self, metric: str, first: float | None) -> Sequence[TrainerCallback]:
        """Callbacks of the trainer, from the main metric without `eval_` prefix and its value before training."""
        return ()

    def stopped(self) -> None:
        """The training loop has ended, complete or not."""

    def finished(self, result: RunResult) -> None:
        """The run is complete, with all files written."""
