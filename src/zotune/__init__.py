"""zotune: fine-tune language models with forward passes only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zotune.io.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from zotune import baselines, methods, objectives, tasks
    from zotune.errors import LostWorkerError, NonFiniteLossError, RankMismatchError
    from zotune.methods import Method
    from zotune.optim.journal import Journal
    from zotune.optim.merge import merge
    from zotune.optim.optimizer import ZerothOrder
    from zotune.optim.privacy import Privacy
    from zotune.optim.replay import replay
    from zotune.optim.state import StepReport
    from zotune.training import schemes
    from zotune.training.config import ZOConfig
    from zotune.training.gguf_loading import load_gguf
    from zotune.training.trainer import ZOTrainer
    from zotune.weights.offload import offload

# Public names are imported when first asked for, so that `zotune --help` need not wait for torch.
_PACKAGES = (
    "attribution", "baselines", "bundled", "engines", "errors", "forward", "memory", "methods", "objectives", "optim", "prompting",
    "subspaces", "tasks", "training", "weights",
)  # fmt: skip
_MODULES = {name: f"zotune.{name}" for name in _PACKAGES} | {"schemes": "zotune.training.schemes"}
_NAMES = {
    "Journal": "zotune.optim.journal",
    "LostWorkerError": "zotune.errors",
    "Method": "zotune.methods",
    "NonFiniteLossError": "zotune.errors",
    "Privacy": "zotune.optim.privacy",
    "RankMismatchError": "zotune.errors",
    "StepReport": "zotune.optim.state",
    "ZOConfig": "zotune.training.config",
    "ZOTrainer": "zotune.training.trainer",
    "ZerothOrder": "zotune.optim.optimizer",
    "load_gguf": "zotune.training.gguf_loading",
    "merge": "zotune.optim.merge",
    "offload": "zotune.weights.offload",
    "replay": "zotune.optim.replay",
}

__all__ = [
    "Journal",
    "LostWorkerError",
    "Method",
    "NonFiniteLossError",
    "Privacy",
    "RankMismatchError",
    "StepReport",
    "ZOConfig",
    "ZOTrainer",
    "ZerothOrder",
    "baselines",
    "load_gguf",
    "merge",
    "methods",
    "objectives",
    "offload",
    "replay",
    "schemes",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'zotune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
