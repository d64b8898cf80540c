"""Losses per example of a batch, token log-probabilities, packed answer choices, and output gradients."""

from __future__ import annotations

from zotune.objectives.losses import (
    AccuracyLoss,
    ChoiceLoss,
    ClassifierLoss,
    LanguageModelLoss,
    MaskedLanguageModelLoss,
    choice_scores,
    class_scores,
    label_word_logits,
    objective,
)
from zotune.objectives.token_logprobs import IGNORE, token_logprobs

__all__ = [
    "IGNORE",
    "AccuracyLoss",
    "ChoiceLoss",
    "ClassifierLoss",
    "LanguageModelLoss",
    "MaskedLanguageModelLoss",
    "choice_scores",
    "class_scores",
    "label_word_logits",
    "objective",
    "token_logprobs",
]
