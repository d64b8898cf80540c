"""The loss of models of images and text on the tokens of a completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives.token_logprobs import IGNORE, scored_logprobs

Batch = Mapping[str, Tensor]

#: Entries of a batch with a row of tokens an example.
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: Entries that are not the model's.
_NOT_INPUTS = ("positions", "targets", "prompt_ids", "prompt_mask", "max_new_tokens", "reference")


@dataclass
class ImageTextLoss:
    """Mean negative log-likelihood in nats of each example's completion, given image and prompt, ``loss(batch) -> (B,)``.

    The batch holds input_ids (B, T), attention_mask (B, T), positions (B, S) and targets (B, S), and what the model's processor makes of
    each example's image, (B, n, ...), such as pixel_values.
    """

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        targets = batch["targets"]
        scored = (targets != IGNORE).sum(dim=1).clamp(min=1)
        return -scored_logprobs(self.model, model_inputs(batch), batch["positions"], targets).sum(dim=1) / scored


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """The model's arguments: those of images are joined over the examples."""
    return {name: value if name in TEXT else value.flatten(0, 1) for name, value in batch.items() if name not in _NOT_INPUTS}
