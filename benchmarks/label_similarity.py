"""A sentence encoder that classifies by the names of the classes: cosine of the sentence's embedding with each name's embedding.

Mean-pooled, normalized embeddings, as such encoders are trained; the scores are 20 times the cosines. There is no new head, so the
untrained encoder already classifies, and the whole of it is what is trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = {
    "sst2": ["a terrible movie", "a great movie"],
    "mr": ["a bad movie", "a good movie"],
    "ag_news": ["world politics", "sports", "business", "science and technology"],
    "trec": ["an abbreviation", "an entity", "a description", "a person", "a place", "a number"],
}
INVERSE_TEMPERATURE = 20.0


class LabelSimilarity(nn.Module):
    """Scores (B, C) of sentences (B, T) against class names (B, C, T'); the names are rows of the batch, so it can be stacked."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        sentences = self.embed(batch["input_ids"], batch["attention_mask"])
        names = self.embed(batch["name_ids"].flatten(0, 1), batch["name_mask"].flatten(0, 1))
        return INVERSE_TEMPERATURE * torch.einsum("bd,bcd->bc", sentences, names.view(len(sentences), -1, sentences.shape[-1]))


class Batches:
    """Adds the names of the classes to a classifier's batches."""

    def __init__(self, tokenizer: Any, task: str) -> None:
        encoded = tokenizer(NAMES[task], return_tensors="pt", padding=True)
        self.ids, self.mask = encoded["input_ids"], encoded["attention_mask"]

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = len(batch["labels"])
        batch.pop("token_type_ids", None)
        return {**batch, "name_ids": self.ids.expand(rows, -1, -1), "name_mask": self.mask.expand(rows, -1, -1)}
