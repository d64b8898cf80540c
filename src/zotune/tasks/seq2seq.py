"""Rows of encoder-decoder language models: prompts and completions, or a task's prompts and right answers, evaluated by generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.objectives.token_logprobs import IGNORE
from zotune.tasks.collators import Collator, padded
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.metrics import ANSWER_METRICS, PADDING
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.rows import Rows

#: Metrics of generated texts.
METRICS = ("token_f1", "exact_match")


@dataclass(frozen=True)
class Seq2SeqCollator(Collator):
    """Batches for ``Seq2SeqLoss``: input_ids and attention_mask (B, T), decoder_input_ids (B, S), targets (B, S).

    Examples that are evaluated add max_new_tokens (B,) and reference (B,).

    Attributes:
        start_id: token that the decoder begins with.
    """

    start_id: int = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        targets = [example["target_ids"] for example in examples]
        length = max(map(len, targets))
        shifted = [[self.start_id, *ids[:-1]] for ids in targets]
        batch = {
            **self._inputs([example["input_ids"] for example in examples]),
            "decoder_input_ids": padded(shifted, length, self.pad_token_id),
            "targets": padded(targets, length, IGNORE),
        }
        for name in ("reference", "max_new_tokens"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


@dataclass(frozen=True)
class ComputeTextMetrics:
    """Callable for ``transformers.Trainer(compute_metrics=...)``: generated ids (N, S), -100 for none, and indices of texts -> means.

    Attributes:
        decode: ids → text.
        references: the right texts of each example that is evaluated.
        metrics: names, the main one first.
    """

    decode: Any
    references: Sequence[Sequence[str]]
    metrics: Sequence[str] = METRICS

    def __call__(self, prediction: Any) -> dict[str, float]:
        found = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        texts = [self.decode([int(token) for token in row if token != PADDING]).strip() for row in found]
        pairs = [(text, self.references[number]) for text, number in zip(texts, np.ravel(prediction.label_ids), strict=True)]
        return {name: float(np.mean([ANSWER_METRICS[name](*pair) for pair in pairs])) for name in self.metrics}


def referred(examples: list[dict[str, Any]], target: str, references: list[tuple[str, ...]] | None) -> list[dict[str, Any]]:
    """The examples without their right `texts`, which move to ``references`` where they are evaluated (None: they are not).

    Args:
        target: the entry with the tokens of the right answer; an evaluation generates one more than the longest has.
    """
    longest = max(len(each[target]) for each in examples)
    for each in examples:
        texts = each.pop("texts")
        if references is not None:
            each |= {"reference": len(references), "max_new_tokens": longest + 1}
            references.append(texts)
    return examples


def prepare(inputs: FamilyInputs) -> Family:
    """The family of rows of an encoder-decoder model; ValueError where the model does not say what its decoder begins with."""
    encoder, task, tokenizer = inputs.encoder, inputs.task, inputs.encoder.tokenizer
    start = getattr(inputs.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"the config of this {inputs.config.model_type} has no decoder_start_token_id, so nothing says what its decoder begins with: "
            'write it into config.json (T5: the padding token, BART: "</s>").'
        )
    references: list[tuple[str, ...]] = []

    def texts_of(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        if task is None:
            return _text(row, "prompt"), (_text(row, "completion"),)
        return task.render(row)[0], tuple(text.strip() for text in task.references(row))

    def example(row: Mapping[str, Any]) -> dict[str, Any]:
        prompt, answers = texts_of(row)
        target = encoder.whole(text_target=answers[0], what="completion")["input_ids"]
        if not answers[0] or not target:
            raise ValueError("there is nothing to score: the completion is empty.")
        return {"input_ids": encoder.whole(prompt, what="prompt")["input_ids"], "target_ids": target, "texts": answers}

    def encode(rows: Rows, evaluated: bool) -> list[dict[str, Any]]:
        if task is None:
            rows.require(["prompt", "completion"])
        return referred(encoder.map_rows(rows, example), "target_ids", references if evaluated else None)

    collate = Seq2SeqCollator(**inputs.padding, start_id=int(start))
    names = METRICS if task is None else task.metrics if task.generation else METRICS[::-1]
    metrics = ComputeTextMetrics(partial(tokenizer.decode, skip_special_tokens=True), references, names)
    ids = lambda example: (example["input_ids"], example["target_ids"])  # noqa: E731
    return Family(ModelKind("seq2seq"), "seq2seq", "seq2seq", encode, collate, collate, metrics, ids)


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} holds {type(row[column]).__name__}, not a string.")
    return row[column].strip()
