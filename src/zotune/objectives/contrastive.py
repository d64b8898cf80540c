"""Losses of sentence embeddings: in-batch negatives, and similarities of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives.tail_gradients import pooled_losses
from zotune.objectives.token_logprobs import at_least_float32

Batch = Mapping[str, Tensor]

#: Factor of cosines, the inverse of a temperature; that of sentence-transformers.
SCALE = 20.0


@dataclass
class ContrastiveLoss:
    """Multiple negatives ranking (1705.00652, 1908.10084), ``loss(batch) -> ()``: the mean over a batch of

        −log softmax(s · cos(anchor_i, candidates))[positive_i]      s = 20

    The candidates are the positives of all examples, then their negatives. The batch is one of :func:`sentence_embeddings` of the texts
    anchor, positive and, where P = 3, negative. An example's loss depends on the others of its batch, so that there is one loss for all of
    them: points are evaluated one after the other, directions are shared, and what needs losses of single examples refuses it.
    """

    model: nn.Module
    capturable = True
    per_example = False

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        return _recorded(self.model, batch, lambda: ranking_loss(sentence_embeddings(self.model, batch)).view(1))[0]


@dataclass
class SimilarityLoss:
    """(cos(u, v) − score)² of each pair, ``loss(batch) -> (B,)``, for a batch of :func:`sentence_embeddings` with score (B,)."""

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        def losses() -> Tensor:
            embeddings = sentence_embeddings(self.model, batch)
            return (F.cosine_similarity(embeddings[:, 0], embeddings[:, 1]) - batch["score"].to(embeddings.dtype)) ** 2

        return _recorded(self.model, batch, losses)


def _recorded(model: nn.Module, batch: Batch, losses: Callable[[], Tensor]) -> Tensor:
    """The losses of embeddings; an active recorder gets their output gradients."""
    return pooled_losses(model, batch["attention_mask"].flatten(0, 1), batch["pooled"].flatten(0, 1), losses)


@tagged("activations")
def ranking_loss(embeddings: Tensor) -> Tensor:
    """The loss of :class:`ContrastiveLoss` of embeddings (B, P, d)."""
    unit = F.normalize(embeddings, dim=2)
    scores = SCALE * unit[:, 0] @ unit[:, 1:].transpose(0, 1).flatten(0, 1).T
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


@tagged("activations")
def sentence_embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """Means of the last hidden states of each text, (B, P, d) in float32.

    The batch holds input_ids (B, P, T), attention_mask (B, P, T) and pooled (B, P, T), 1 for the tokens that the mean is over.
    """
    shape = batch["input_ids"].shape
    output = model(input_ids=batch["input_ids"].flatten(0, 1), attention_mask=batch["attention_mask"].flatten(0, 1))
    states = at_least_float32(getattr(output, "last_hidden_state", output[0]))
    weights = batch["pooled"].flatten(0, 1).to(states.dtype).unsqueeze(2)
    return ((states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).view(*shape[:2], -1)
