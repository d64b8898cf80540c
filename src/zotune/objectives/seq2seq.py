"""The loss of encoder-decoder language models on the tokens of a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives.output_gradients import recorded
from zotune.objectives.token_logprobs import IGNORE, scored_logprobs

Batch = Mapping[str, Tensor]


@dataclass
class Seq2SeqLoss:
    """Mean negative log-likelihood in nats of each example's target tokens, given its input, ``loss(batch) -> (B,)``.

    The batch holds input_ids (B, T) and attention_mask (B, T) of the encoder, decoder_input_ids (B, S), the targets shifted to the right
    behind the decoder's start token, and targets (B, S), -100 where there is none. Padding on the right changes no example's loss. An
    active recorder gets the output gradients at the decoder's positions.
    """

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        targets = batch["targets"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
        rows, length = targets.shape
        positions = torch.arange(length, device=targets.device).expand(rows, length)
        real = targets != IGNORE
        scored = real.sum(dim=1).clamp(min=1)
        found = scored_logprobs(self.model, inputs, positions, targets, shares=1 / scored, length=length, mask=real.long())
        return recorded(-found.sum(dim=1) / scored)
