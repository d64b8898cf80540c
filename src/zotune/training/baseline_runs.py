"""Baselines without steps: zero-shot, in-context learning, a linear probe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import EvalPrediction

from zotune.baselines import Baseline
from zotune.baselines.logistic_regression import features_of, fit, fit_by_folds
from zotune.io.atomic import whole_file
from zotune.tasks import LanguageModelCollator, PreparedData
from zotune.training.run_folder import PROBE_FILE

if TYPE_CHECKING:
    from zotune.training.trainer import ZOTrainer

#: As in MeZO's comparison (2305.17333).
DEMONSTRATIONS = 32


def check(method: Baseline, scheme: Any, data: PreparedData) -> None:
    """ValueError where a baseline that trains no parameters is given a scheme, or no evaluation data."""
    if scheme.scheme != "full" or scheme.trainable:
        raise ValueError(f"{method.name} trains none of the model's parameters, so a --scheme has no effect: leave it out.")
    if data.eval is None:
        raise ValueError(f"{method.name} only evaluates, and there are no evaluation data: pass --task or --eval_file.")
    if method.kind == "fit":
        task = data.task
        if task is None or not task.fixed_options or data.eval_objective != "choices":
            raise ValueError(
                "linear-probe needs a task whose rows share their answer options, and a causal language model (an encoder's head alone: "
                "--method fo-adamw --scheme head)."
            )


def linear_probe(method: Baseline, trainer: ZOTrainer, data: PreparedData, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of a linear probe fitted on the training examples; its loss, forward passes and seconds."""
    assert data.train is not None and data.eval is not None and data.task is not None
    model, args = trainer.model, trainer.args
    collate = LanguageModelCollator(data.collate_eval.pad_token_id)  # type: ignore[attr-defined]
    begin = time.perf_counter()
    size = args.per_device_train_batch_size
    features = features_of(model, data.train, collate, size, args.device)
    answers = torch.tensor([example["answer"] for example in data.train], device=args.device)
    classes, folds = len(data.task.labels), method.options["folds"]
    probe = fit_by_folds(features, answers, classes, folds) if folds else fit(features, answers, classes, method.options["l2"])
    loss = float(torch.nn.functional.nll_loss(probe.scores(features), answers))
    seconds = time.perf_counter() - begin
    scores = probe.scores(features_of(model, data.eval, collate, args.per_device_eval_batch_size, args.device))
    right = torch.tensor([example["answer"] for example in data.eval], device=args.device)
    metrics = {"loss": float(torch.nn.functional.nll_loss(scores, right))}
    if data.compute_metrics is not None:
        metrics |= data.compute_metrics(EvalPrediction(predictions=scores.cpu().numpy(), label_ids=right.cpu().numpy()))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: getattr(probe, name).cpu().contiguous() for name in ("weight", "bias", "mean", "deviation")}
    with whole_file(folder / PROBE_FILE) as partial:
        save_file(parts, partial)
    counts = {"loss": loss, "forward_passes": -(-len(data.train) // size), "sequences_evaluated": len(data.train), "seconds": seconds}
    return {name: float(value) for name, value in metrics.items()}, counts
