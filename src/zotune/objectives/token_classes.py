"""The loss of token classifiers on the first token of each word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives.tail_gradients import token_losses
from zotune.objectives.token_logprobs import IGNORE, at_least_float32, cross_entropy, scored_logits

Batch = Mapping[str, Tensor]


@dataclass
class TokenClassLoss:
    """Mean cross-entropy in nats of each example's words, ``loss(batch) -> (B,)``.

    The batch is one of :func:`word_logits`, with targets (B, S), the words' classes, -100 where there is none.
    """

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        scored = batch["targets"] != IGNORE
        return token_losses(self.model, batch, scored, lambda rows: word_losses(word_logits(self.model, rows), rows["targets"]))


@tagged("activations")
def word_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, S, classes) in float32 of the words, each at its first token.

    The batch holds input_ids (B, T), attention_mask (B, T), token_type_ids where the model has them, and positions (B, S).
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    return at_least_float32(scored_logits(model, inputs, batch["positions"]))


@tagged("activations")
def word_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the words of each example: (B, S, classes), (B, S) -> (B,)."""
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten()).view(targets.shape)
    return losses.sum(dim=1) / (targets != IGNORE).sum(dim=1).clamp(min=1)
