"""Losses and predictions of evaluation batches, of families of models beside causal language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from zotune.objectives.contrastive import SimilarityLoss, ranking_loss, sentence_embeddings
from zotune.objectives.image_text import TEXT, ImageTextLoss, model_inputs
from zotune.objectives.losses import head_losses, media_scores
from zotune.objectives.seq2seq import Seq2SeqLoss
from zotune.objectives.token_classes import word_logits, word_losses
from zotune.objectives.token_logprobs import IGNORE

Batch = Mapping[str, Tensor]


@torch.no_grad()
def generated(model: nn.Module, batch: Batch) -> Tensor:
    """Greedy outputs of an encoder-decoder, token ids (B, S), -100 behind their end.

    Args:
        model: an encoder-decoder of transformers (or PEFT), with its own ``generate``.
        batch: input_ids (B, T) and attention_mask (B, T), decoder_input_ids (B, S), whose first token begins, and max_new_tokens (B,).
    """
    found: Any = model
    own = found.generation_config
    start = int(batch["decoder_input_ids"][0, 0])
    settings = _greedy(batch, decoder_start_token_id=start, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    written = found.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings)[:, 1:]
    return _until_end(written, own.eos_token_id)


def _greedy(batch: Batch, **tokens: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=int(batch["max_new_tokens"].max()), **tokens)


def _of_seq2seq(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return Seq2SeqLoss(model)(batch).mean(), generated(model, batch), batch["reference"]


def _of_images(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    loss, found = ImageTextLoss(model)(batch).mean(), cast(Any, model)
    images = {name: value for name, value in model_inputs(batch).items() if name not in TEXT}
    ends = found.generation_config.eos_token_id
    settings = _greedy(batch, eos_token_id=ends, pad_token_id=int(found.generation_config.pad_token_id or 0))
    prompts = batch["prompt_ids"]
    with torch.no_grad():
        written = found.generate(input_ids=prompts, attention_mask=batch["prompt_mask"], **images, generation_config=settings)
    return loss, _until_end(written[:, prompts.shape[1] :], ends), batch["reference"]


def _until_end(written: Tensor, end: int | list[int] | None) -> Tensor:
    ends = end if isinstance(end, list) else [] if end is None else [end]
    ended = torch.isin(written, torch.tensor(ends, dtype=written.dtype, device=written.device))
    return written.masked_fill(ended.cumsum(dim=1) - ended.long() > 0, IGNORE)


def _of_words(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    logits = word_logits(model, batch)
    return word_losses(logits, batch["targets"]).mean(), logits.argmax(dim=2), batch["targets"]


def _of_pairs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    embeddings = sentence_embeddings(model, batch)
    if "score" in batch:
        return SimilarityLoss(model)(batch).mean(), embeddings[:, :2], batch["score"]
    return ranking_loss(embeddings), embeddings[:, :2], torch.zeros(len(embeddings), device=embeddings.device)


def _of_media(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    scores = media_scores(model, batch)
    return head_losses(model, scores, batch["labels"]).mean(), scores, batch["labels"]


#: By the name of an objective: (model, batch) → loss, predictions and labels.
PREDICTIONS: dict[str, Callable[[nn.Module, Batch], tuple[Tensor, Tensor, Tensor]]] = {
    "seq2seq": _of_seq2seq,
    "token-classes": _of_words,
    "contrastive": _of_pairs,
    "similarity": _of_pairs,
    "image-text": _of_images,
    "media": _of_media,
}
