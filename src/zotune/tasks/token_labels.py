"""Rows of words with a tag each, for token classifiers: ``{"tokens": ["Ada", "sang"], "tags": ["B-PER", "O"]}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from zotune.objectives.token_logprobs import IGNORE
from zotune.tasks.chat_tokens import CUT
from zotune.tasks.collators import Collator, padded
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.head_labels import class_number, read_labels
from zotune.tasks.metrics import PADDING, macro_f1
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.rows import Rows

#: Names of the column of tags.
TAGS = ("tags", "ner_tags", "pos_tags")


@dataclass(frozen=True)
class TokenClassCollator(Collator):
    """Batches for ``TokenClassLoss``: input_ids and attention_mask (B, T), token_type_ids where given, positions and targets (B, S)."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._inputs([example["input_ids"] for example in examples])
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = padded([example["token_type_ids"] for example in examples], batch["input_ids"].shape[1], 0)
        words = max(len(example["positions"]) for example in examples)
        batch["positions"] = padded([example["positions"] for example in examples], words, 0)
        batch["targets"] = padded([example["tags"] for example in examples], words, IGNORE)
        return batch


@dataclass(frozen=True)
class ComputeTagMetrics:
    """Callable for ``transformers.Trainer(compute_metrics=...)``: predicted and right tags (N, S), -100 for none -> named floats.

    Where the tags are those of spans (B-PER, I-PER, O), ``f1`` is that of whole entities, as CoNLL counts them; else the mean of the tags'.

    Attributes:
        names: of the tags.
    """

    names: Sequence[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names, the main one first."""
        return ("f1", "accuracy") if self._spans else ("accuracy", "f1")

    @property
    def _spans(self) -> bool:
        return "O" in self.names and all(name == "O" or name[:2] in ("B-", "I-") for name in self.names)

    def __call__(self, prediction: Any) -> dict[str, float]:
        found = prediction.predictions
        found, right = np.asarray(found[0] if isinstance(found, tuple) else found), np.asarray(prediction.label_ids)
        kept = right != PADDING
        f1 = self._entity_f1(found, right) if self._spans else macro_f1(found[kept], right[kept])
        values = {"accuracy": float(np.mean(found[kept] == right[kept])), "f1": f1}
        return {name: values[name] for name in self.metrics}

    def _entity_f1(self, found: np.ndarray, right: np.ndarray) -> float:
        predicted = {
            (row, *span) for row, (tags, kept) in enumerate(zip(found, right != PADDING, strict=True)) for span in self._of(tags[kept])
        }
        true = {(row, *span) for row, tags in enumerate(right) for span in self._of(tags[tags != PADDING])}
        return 2 * len(predicted & true) / (len(predicted) + len(true)) if predicted or true else 0.0

    def _of(self, tags: np.ndarray) -> list[tuple[int, int, str]]:
        """(first word, word behind the last, kind) of each entity; I- behind another kind begins one."""
        spans: list[tuple[int, int, str]] = []
        for place, name in enumerate(self.names[tag] for tag in tags):
            if name == "O":
                continue
            kind = name[2:]
            if name[0] == "I" and spans and spans[-1][1:] == (place, kind):
                spans[-1] = (spans[-1][0], place + 1, kind)
            else:
                spans.append((place, place + 1, kind))
        return spans


def prepare(inputs: FamilyInputs) -> Family:
    """The family of tagged words."""
    rows, encoder, tokenizer = inputs.rows, inputs.encoder, inputs.encoder.tokenizer
    column = next(name for name in TAGS if name in rows.columns)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not say which word a token is of: token classification needs a fast tokenizer.")
    names = _names(inputs, column)
    index = {name: number for number, name in enumerate(names)}

    def example(row: Mapping[str, Any]) -> dict[str, Any]:
        words, tags = read_labels([row["tokens"]])[0], read_labels([row[column]])[0]
        if not isinstance(words, list) or not isinstance(tags, list) or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"columns 'tokens' and {column!r} hold a list of words, and a list of as many tags.")
        if len(words) != len(tags) or not words:
            raise ValueError(f"there are {len(words)} tokens and {len(tags)} {column}: give each token one tag.")
        options = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
        encoded = tokenizer(words, **options)
        if encoder.limit is not None and len(encoded["input_ids"]) > encoder.limit:
            if not encoder.truncate:
                raise ValueError(encoder.too_long(f"the text has {len(encoded['input_ids'])} tokens"))
            encoder.facts.add(CUT)
            encoded = tokenizer(words, truncation=True, max_length=encoder.limit, **options)
        first = {word: place for place, word in reversed(list(enumerate(encoded.word_ids()))) if word is not None}
        lost = next((word for number, word in enumerate(words) if number not in first), None)
        if lost is not None and not encoder.truncate:
            raise ValueError(f"the word {lost!r} has no token.")
        scored = sorted(first)
        kept = {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}
        return {**kept, "positions": [first[word] for word in scored], "tags": [class_number(tags[word], index, column) for word in scored]}

    def encode(rows: Rows, evaluated: bool) -> list[dict[str, Any]]:
        rows.require(["tokens", column])
        return encoder.map_rows(rows, example)

    collate = TokenClassCollator(**inputs.padding)
    metrics = ComputeTagMetrics(names)
    return Family(ModelKind("tokens", names), "token-classes", "token-classes", encode, collate, collate, metrics)


def _names(inputs: FamilyInputs, column: str) -> tuple[str, ...]:
    """Names of the tags: those of the model's head, else of all rows to train on."""
    config = inputs.config
    if any(name.endswith("ForTokenClassification") for name in getattr(config, "architectures", None) or ()):
        return tuple(str(config.id2label[number]) for number in range(config.num_labels))
    found = {tag for tags in read_labels(inputs.rows.map(lambda row: row[column])) if isinstance(tags, list) for tag in tags}
    if not found or not all(isinstance(tag, str | int) for tag in found):
        raise ValueError(f"{inputs.rows.source}: column {column!r} holds no lists of tags: a tag is a name or a whole number.")
    return tuple(map(str, sorted(found) if all(isinstance(tag, int) for tag in found) else sorted(map(str, found))))
