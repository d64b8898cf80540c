"""Runs of LOZO-G on a tiny Llama."""

from __future__ import annotations

import torch

from trainer_cases import choice_rows, collate_completions
from zotune import ZerothOrder, methods, objectives
from zotune.subspaces.guided import GuidedCoordinate

ROWS = choice_rows(64)
INTERVAL = 2


def batch(step: int, size: int = 8) -> dict[str, torch.Tensor]:
    start = step * size % len(ROWS)
    return collate_completions(ROWS[start : start + size])


def examples(step: int, count: int) -> list[dict[str, torch.Tensor]]:
    return [collate_completions(ROWS[start : start + 16]) for start in range(0, min(count, len(ROWS)), 16)]


def optimizer(model: torch.nn.Module, lr: float | str = 1e-2, **options) -> ZerothOrder:
    method = methods.lozo_g(**{"interval": INTERVAL, "rank": 2, "guide": 2, "examples": 48, **options})
    return ZerothOrder(model, method, lr=lr, sample_batches=examples)


def guided_coordinates(steps: ZerothOrder) -> list[GuidedCoordinate]:
    return [c for c in steps.forward.coordinates if isinstance(c, GuidedCoordinate) and c.guided]


def run(model: torch.nn.Module, steps: ZerothOrder, first: int, last: int) -> None:
    loss_fn = objectives.LanguageModelLoss(model)
    for step in range(first, last):
        steps.step(loss_fn, batch(step))
