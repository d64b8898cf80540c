"""Data sets of texts given to a trainer: encoded as `zotune train` encodes the rows of a file without a task."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from zotune.tasks.collators import LanguageModelCollator
from zotune.tasks.columns import FORMATS, USED
from zotune.tasks.encoding import Encoder, context_limit, pad_token_id
from zotune.tasks.sources import Rows
from zotune.tasks.vocabulary import check_vocabulary
from zotune.weights.structure import classifier_of

_NAMES = tuple(inspect.signature(Trainer.__init__).parameters)[3:]  # behind self, model and args


def with_encoded_texts(model: nn.Module | None, objective: Any, positional: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer behind model and args, with data sets of texts encoded, and their collator.

    Data sets with a collator or another objective than "lm" are kept as they are.

    Raises:
        ValueError: there is no tokenizer, or a row cannot be encoded; the message names it.
    """
    found = {**dict(zip(_NAMES, positional, strict=False)), **options}
    if found.get("data_collator") is not None or objective not in (None, "lm"):
        return found
    given = {name: found.get(name) for name in ("train_dataset", "eval_dataset")}
    texts = {name: _columns(data) is not None for name, data in given.items() if data is not None}
    if not any(texts.values()):
        return found
    if not all(texts.values()):
        raise ValueError("of train_dataset and eval_dataset one holds texts and the other tokens: give both alike.")
    if model is not None and classifier_of(model) is not None:
        raise ValueError("a classifier needs tokens with labels, and the data set holds texts: tokenize it, or use `zotune train --task`.")
    tokenizer = tokenizer_of(found.get("processing_class"))
    for name in texts:
        found[name] = encoded(given[name], tokenizer, model, name)
    return {**found, "data_collator": LanguageModelCollator(pad_token_id(tokenizer))}


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a trainer; ValueError where it has none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError("the data set holds texts: pass processing_class=tokenizer, which encodes them, or tokenize it first.")
    return tokenizer


def encoded(dataset: Any, tokenizer: Any, model: nn.Module | None, source: str) -> Any:
    """The examples of a data set of texts, a list (of a stream: a stream); any other data set as it is.

    Args:
        dataset: rows with text, messages, or prompt and completion; or a mapping of data sets.
        tokenizer, model: for the tokens and their limits.
        source: what to call it in messages.
    """
    if isinstance(dataset, Mapping):
        return {name: encoded(part, tokenizer, model, f"{source} {name!r}") for name, part in dataset.items()}
    columns = _columns(dataset)
    if columns is None:
        return dataset
    config = getattr(model, "config", None)
    encoder = Encoder(tokenizer, context_limit(tokenizer, config)[0])
    if not has_length(dataset):
        used = next(USED[names[0]] for names in FORMATS if set(names) <= set(columns))

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            return encoder.completions(Rows([{name: row[name] for name in used if name in row}], source, [0], "row"))[0]

        return dataset.map(encode, remove_columns=columns)
    rows = dataset if hasattr(dataset, "column_names") else [dataset[index] for index in range(len(dataset))]
    examples = encoder.completions(Rows(rows, source, range(len(rows)), "row"))
    check_vocabulary(tokenizer, config, pad_token_id(tokenizer), examples)
    return examples


def _columns(dataset: Any) -> list[str] | None:
    """The columns of a data set of texts; None for other data, and for a stream that does not say."""
    if isinstance(dataset, Mapping):
        return next((found for part in dataset.values() if (found := _columns(part)) is not None), None)
    columns, sized = getattr(dataset, "column_names", None), has_length(dataset)
    first = dataset[0] if sized and len(dataset) else None
    if columns is None and isinstance(first, Mapping):
        columns = list(first)
    if not columns or not any(set(names) <= set(columns) for names in FORMATS) or {"input_ids", "prompt_ids", "positions"} & set(columns):
        return None
    if isinstance(first, Mapping) and not any(isinstance(first.get(name), (str, list)) for names in FORMATS for name in names):
        return None
    return list(columns)
