"""Fine-tuning runs on Hugging Face's side: their settings, data loading, trainer, checkpoints, and :func:`zotune.training.run.run`."""

from zotune.io.lazy import submodules

__getattr__ = submodules(__name__, "evaluation", "schemes", "sft")
