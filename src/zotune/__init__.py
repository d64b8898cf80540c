"""zotune: fine-tune language models with forward passes only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zotune import first_order, journal, methods, objectives, offloading, schemes, tasks
    from zotune.config import ZOConfig
    from zotune.journal import Journal
    from zotune.merging import merge
    from zotune.methods import Method
    from zotune.offloading import offload
    from zotune.optimizer import NonFiniteLossError, StepReport, ZerothOrder
    from zotune.replaying import replay
    from zotune.trainer import ZOTrainer

# Public names are imported when first asked for, so that `zotune --help` need not wait for torch.
_MODULES = ("first_order", "journal", "methods", "objectives", "offloading", "schemes", "tasks")
_NAMES = {
    "Journal": "journal",
    "Method": "methods",
    "NonFiniteLossError": "optimizer",
    "StepReport": "optimizer",
    "ZOConfig": "config",
    "ZOTrainer": "trainer",
    "ZerothOrder": "optimizer",
    "merge": "merging",
    "offload": "offloading",
    "replay": "replaying",
}

__all__ = [
    "Journal",
    "Method",
    "NonFiniteLossError",
    "StepReport",
    "ZOConfig",
    "ZOTrainer",
    "ZerothOrder",
    "first_order",
    "journal",
    "merge",
    "methods",
    "objectives",
    "offload",
    "offloading",
    "replay",
    "schemes",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"zotune.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"zotune.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'zotune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
