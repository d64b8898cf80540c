"""TRL's supervised fine-tuning with forward passes only: :class:`SFTTrainer` has the constructor of TRL's, and takes its `SFTConfig`."""

from zotune.training.sft.trainer import SFTTrainer

__all__ = ["SFTTrainer"]
