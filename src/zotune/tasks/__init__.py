"""Tasks: rows, prompts and options, encoded examples, batches and metrics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zotune.tasks.encoding import Encoder, context_limit, pad_token_id
from zotune.tasks.loader import load, names
from zotune.tasks.metrics import ComputeAnswerMetrics, ComputeMetrics
from zotune.tasks.sources import Rows, demonstrated, load_rows, read_jsonl
from zotune.tasks.task import Task

if TYPE_CHECKING:
    from zotune.tasks.collators import ChoicesCollator, ClassifierCollator, GenerationCollator, LanguageModelCollator, MaskedCollator
    from zotune.tasks.objective_choice import is_encoder
    from zotune.tasks.preparation import PreparedData, prepare

# These import torch, which listing the tasks does not need.
_LATE = {
    "ChoicesCollator": "collators",
    "ClassifierCollator": "collators",
    "GenerationCollator": "collators",
    "LanguageModelCollator": "collators",
    "MaskedCollator": "collators",
    "PreparedData": "preparation",
    "is_encoder": "objective_choice",
    "prepare": "preparation",
}

__all__ = [
    "ChoicesCollator",
    "ClassifierCollator",
    "ComputeAnswerMetrics",
    "ComputeMetrics",
    "Encoder",
    "GenerationCollator",
    "LanguageModelCollator",
    "MaskedCollator",
    "PreparedData",
    "Rows",
    "Task",
    "context_limit",
    "demonstrated",
    "is_encoder",
    "load",
    "load_rows",
    "names",
    "pad_token_id",
    "prepare",
    "read_jsonl",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
