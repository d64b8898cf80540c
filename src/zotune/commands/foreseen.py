"""What a run will need of the memory that `--max_memory` caps, before any of its weights is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zotune import catalogue
from zotune.commands.arguments import ModelArguments
from zotune.commands.models import ModelPlan, resolve_dtype
from zotune.config import ZOConfig
from zotune.first_order import Rival
from zotune.memory.offloaded import needs
from zotune.memory.step import Workload
from zotune.methods import Method
from zotune.offloading.cap import Needs
from zotune.schemes import Scheme
from zotune.tasks import PreparedData


def needs_of(
    model: ModelArguments, plan: ModelPlan, config: ZOConfig, data: PreparedData, method: Method | Rival | None, scheme: Scheme
) -> Needs | None:
    """What `zotune estimate` predicts for the longest batches of training and of evaluation; None without `--max_memory`.

    Args:
        model: the user's options.
        plan: of the model.
        config: batch sizes and device.
        data: encoded.
        method: None where nothing is trained.
        scheme: what moves.
    """
    if model.max_memory is None:
        return None
    dtype = resolve_dtype(model.dtype, config.device)
    if dtype == "auto":
        dtype = plan.config.dtype or torch.float32
    zero_shot = catalogue.get("zero-shot")
    workloads = []
    if isinstance(method, Method) and data.train:
        shape = _longest(data.train, data.collate_train, config.per_device_train_batch_size)
        workloads.append(Workload(plan.config, method, scheme, *shape[:2], dtype, shape[2], config.probe))
    held_out = data.dev or data.eval
    if held_out:
        shape = _longest(held_out, data.collate_eval, config.per_device_eval_batch_size)
        workloads.append(Workload(plan.config, zero_shot, Scheme(), *shape[:2], dtype, shape[2]))
    return needs(workloads, accelerator=config.device.type == "cuda", blocks=model.offload_blocks)


def _longest(
    examples: Sequence[Mapping[str, Any]], collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]], size: int
) -> tuple[int, int, int | None]:
    """Rows, tokens and scored tokens (None: all) of the largest batch."""
    batch = collate(sorted(examples, key=_tokens)[-size:])
    rows, length = batch["input_ids"].shape
    scored = batch["positions"].shape[1] if "positions" in batch else None
    return int(rows), max(2, int(length)), scored if scored is None or scored < length else None


def _tokens(example: Mapping[str, Any]) -> int:
    return sum(_count(value) for value in example.values())


def _count(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(_count(entry) for entry in value)
    return int(value.numel()) if isinstance(value, torch.Tensor) else 1
