"""A guard against forgetting: other data that are evaluated beside those of a run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from zotune.tasks import PreparedData, prepare
from zotune.training.arguments import DataArguments
from zotune.training.evaluation import measured

if TYPE_CHECKING:
    from zotune.training.trainer import ZOTrainer

#: Before the names of a guard's metrics.
PREFIX = "guard_"


def guard_data(tokenizer: Any, model_config: Any, data: DataArguments, seed: int, *, masked: bool = False) -> PreparedData | None:
    """The data of `--guard_task` and `--guard_file`; None without. ``masked``: label words at masks, as those of the run.

    Raises:
        ValueError: they cannot be loaded or encoded; the message names the option.
    """
    if data.guard_task is None and data.guard_file is None:
        return None
    common: dict[str, Any] = {
        "num_eval": data.num_eval,
        "max_length": data.max_length,
        "truncate": data.truncate,
        "seed": seed,
        "parts": ("eval",),
        "objective": "mlm" if masked else None,
    }
    if data.guard_file is None:
        common["data_dir"] = data.data_dir
    try:
        return prepare(tokenizer, model_config, task=data.guard_task, eval_file=data.guard_file, **common)
    except ValueError as error:
        raise ValueError(f"--guard_{'file' if data.guard_task is None else 'task'}: {error}") from None


class Guard(TrainerCallback):
    """Evaluates its data at each evaluation of a trainer, and logs their metrics as ``guard_accuracy`` and the like.

    Args:
        trainer: of the run.
        data: from :func:`guard_data`.

    Attributes:
        seconds: of the evaluations.
        main_metric: as it is logged.
    """

    def __init__(self, trainer: ZOTrainer, data: PreparedData) -> None:
        self.trainer, self.data, self.seconds = trainer, data, 0.0
        self.main_metric = PREFIX + data.main_metric

    def metrics(self) -> dict[str, float]:
        """Metrics of the model as it is."""
        begin = time.perf_counter()
        with self.trainer.evaluating(self.data.eval_objective, self.data.collate_eval, self.data.compute_metrics):
            found = measured(self.trainer, self.data.eval)
        self.seconds += time.perf_counter() - begin
        return {PREFIX + name: value for name, value in found.items()}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log(self.metrics())
