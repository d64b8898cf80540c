"""The memory that computation needs beside the weights under `--max_memory`, predicted before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zotune.baselines import Baseline, catalog
from zotune.memory.estimate import estimate
from zotune.memory.shapes import build
from zotune.memory.workload import Workload
from zotune.methods import Method
from zotune.tasks import PreparedData
from zotune.training.arguments import ModelArguments
from zotune.training.config import ZOConfig
from zotune.training.loading import ModelPlan, resolve_dtype
from zotune.training.schemes import Scheme
from zotune.weights.offload import budget
from zotune.weights.offload.budget import Needs
from zotune.weights.precision import HALF

#: Kinds of models whose memory :func:`zotune.memory.estimate` predicts.
PREDICTED = ("causal", "masked", "classifier")


def needs(workloads: Sequence[Workload], *, accelerator: bool, blocks: str | Sequence[str] | None = None) -> Needs:
    """The most that any of these takes beside weights, from :func:`zotune.memory.estimate`; no weight is read or made.

    Args:
        workloads: those of one model: training, evaluation.
        accelerator: as on a GPU; otherwise as on a CPU.
        blocks: the list of blocks, as in :func:`zotune.offload`.

    Raises:
        ValueError: no blocks are found, or a method does not apply to the model.
    """
    growth = max((_growth(workload) for workload in workloads), default=1.0)
    most = 0
    for workload in workloads:
        split = estimate(workload, accelerator=accelerator)
        with torch.device("meta"):
            whole, rest, _, _ = budget.sizes(build(workload.config, workload.dtype, masked=workload.masked), blocks)
        residuals = (_growth(workload) - 1) * (whole - rest)  # they move with their blocks
        most = max(most, split.total - split.kinds["weights"] - int(residuals))
    return Needs(most, growth)


def _growth(workload: Workload) -> float:
    """Bytes of a block over those of its weights: half-precision weights may have residuals of 16 bits."""
    method = workload.method
    written = isinstance(method, Method) and method.rounding == "residual" and workload.scheme.scheme == "full"
    return 2.0 if written and workload.dtype in HALF else 1.0


def needs_of(
    model: ModelArguments, plan: ModelPlan, config: ZOConfig, data: PreparedData, method: Method | Baseline | None, scheme: Scheme
) -> Needs | None:
    """The needs of the longest batches of training (``method`` None: no training) and of evaluation.

    None, for a fixed share, without `--max_memory`, and for kinds of models whose memory is not predicted.
    """
    if model.max_memory is None or data.kind.name not in PREDICTED:
        return None
    dtype = resolve_dtype(model.dtype, config.device)
    if dtype == "auto":
        dtype = plan.config.dtype or torch.float32
    zero_shot = catalog.get("zero-shot")
    workloads = []
    if isinstance(method, Method) and data.train:
        shape = _longest(data.train, data.collate_train, config.per_device_train_batch_size, config.max_completion_length)
        workloads.append(Workload(plan.config, method, scheme, *shape[:2], dtype, shape[2], config.forward_batching, masked=data.masked))
    held_out = data.dev or data.eval
    if held_out:
        shape = _longest(held_out, data.collate_eval, config.per_device_eval_batch_size, config.max_completion_length)
        workloads.append(Workload(plan.config, zero_shot, Scheme(), *shape[:2], dtype, shape[2], masked=data.masked))
    return needs(workloads, accelerator=config.device.type == "cuda", blocks=model.offload_blocks)


def _longest(
    examples: Sequence[Mapping[str, Any]], collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]], size: int, completion: int
) -> tuple[int, int, int | None]:
    """Rows, tokens and scored tokens (None: all) of the largest batch; of prompts to be completed, with ``completion`` more tokens."""
    batch = collate(sorted(examples, key=_tokens)[-size:])
    if "prompt_number" in batch:
        rows, length = batch["prompt_ids"].shape
        return int(rows), int(length) + completion, 1
    rows, length = batch["input_ids"].shape
    scored = batch["positions"].shape[1] if "positions" in batch else None
    return int(rows), max(2, int(length)), scored if scored is None or scored < length else None


def _tokens(example: Mapping[str, Any]) -> int:
    return sum(_count(value) for value in example.values())


def _count(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(_count(entry) for entry in value)
    return int(value.numel()) if isinstance(value, torch.Tensor) else 1
