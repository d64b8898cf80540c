"""Data sets of prompts for a trainer: rows as for TRL's GRPO → encoded prompts, and the tokens that end a completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.trainer_utils import has_length

from zotune.tasks.encoding import Encoder, context_limit, pad_token_id
from zotune.tasks.prompts import RewardCollator, encode_prompts, stop_tokens
from zotune.tasks.sources import Rows
from zotune.tasks.vocabulary import check_vocabulary

__all__ = ["PromptData", "RewardCollator", "end_of_text"]


@dataclass
class PromptData:
    """Encodes data sets of prompts.

    Attributes:
        tokenizer, model: for the tokens, their limits and ends.
        max_completion_length: tokens that must fit behind a prompt.
        stops: tokens that end a completion, beside those of the model; known once a data set is encoded.
    """

    tokenizer: Any
    model: nn.Module
    max_completion_length: int
    stops: tuple[int, ...] = ()

    def encoded(self, dataset: Any, source: str) -> Any:
        """Examples ``{"prompt_ids", "prompt", "columns", "number"}``; of a mapping of data sets, those of each; encoded ones as they are.

        Args:
            dataset: rows with a `prompt`, a text or messages; a list of dicts or a ``datasets.Dataset``.
            source: what to call it in messages.

        Raises:
            ValueError: a stream, no rows, or a row that cannot be encoded; the message names it.
        """
        if dataset is None or _is_encoded(dataset):
            return dataset
        if isinstance(dataset, Mapping):
            return {name: self.encoded(part, f"{source} {name!r}") for name, part in dataset.items()}
        if not has_length(dataset):
            raise ValueError(f"{source} is a stream, and prompts are numbered: load it into a list first.")
        if not len(dataset):
            raise ValueError(f"{source} holds no rows: rows with a 'prompt' are expected.")
        rows = dataset if hasattr(dataset, "column_names") else [dataset[index] for index in range(len(dataset))]
        config = getattr(self.model, "config", None)
        encoder = Encoder(self.tokenizer, context_limit(self.tokenizer, config)[0])
        numbered = Rows(rows, source, range(len(rows)), "row")
        examples = encode_prompts(encoder, numbered, max_completion_length=self.max_completion_length)
        check_vocabulary(self.tokenizer, config, pad_token_id(self.tokenizer), examples)
        self.stops = tuple(dict.fromkeys((*self.stops, *stop_tokens(encoder, examples, None))))
        return examples

    @property
    def collator(self) -> RewardCollator:
        """The batches of the examples."""
        return RewardCollator(pad_token_id(self.tokenizer), stops=self.stops)


def end_of_text(model: Any) -> tuple[int, ...]:
    """Ids of the tokens that end a text by a model's generation settings, else by its configuration."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (found,)
    return ()


def _is_encoded(dataset: Any) -> bool:
    first = dataset[0] if has_length(dataset) and not isinstance(dataset, Mapping) and len(dataset) else None
    return isinstance(first, Mapping) and {"prompt_ids", "prompt", "columns", "number"} <= first.keys()
