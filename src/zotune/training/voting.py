"""Answers by the majority of several points of a model (RandOpt, 2603.12228)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from zotune.optim.optimizer import ZerothOrder
from zotune.subspaces.coordinate import Offset
from zotune.tasks.metrics import PADDING, majority
from zotune.training.evaluation import EvaluatedTrainer


def voted(trainer: EvaluatedTrainer, optimizer: ZerothOrder, points: Sequence[Offset], examples: Any) -> dict[str, float]:
    """Metrics of the answers that most points give, of equals that of the first; no weight is written.

    Args:
        trainer: of the optimizer's model, with ``compute_metrics`` of options or of generated answers.
        optimizer: evaluates the points.
        points: the best first.
        examples: encoded.

    Raises:
        ValueError: the examples have no answers.
    """
    compute: Any = trainer.compute_metrics
    if not hasattr(compute, "answers"):
        raise ValueError("--vote counts answers, and these data have none: evaluate a task of options or of generated answers.")
    loader, labels = trainer.get_eval_dataloader(examples), None
    found: list[np.ndarray] = []
    for point in points:
        loop = partial(trainer.evaluation_loop, loader, "evaluation", prediction_loss_only=False)
        result = optimizer.forward.evaluate(loop, point)
        optimizer.forward.drop_directions()
        predictions = result.predictions
        found.append(np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions))
        labels = result.label_ids
    width = max(each.shape[1] for each in found)
    table = np.stack([np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=PADDING) for each in found])
    chosen = majority([compute.answers(each) for each in table])
    return dict(compute((table[chosen, np.arange(len(chosen))], labels)))
