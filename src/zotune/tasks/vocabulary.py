"""The check that every token of the data has a row in the model's embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from zotune.weights.structure import text_config


def check_vocabulary(tokenizer: Any, model_config: Any, padding: int, examples: Iterable[Mapping[str, Any]]) -> None:
    """ValueError that names a token of encoded examples, or the padding, without a row in the model's embeddings.

    A tokenizer may have more tokens than the model as long as the data do not use them (Gemma 3 of text alone has one for images).
    """
    rows = getattr(text_config(model_config), "vocab_size", None)
    if not isinstance(rows, int):
        return
    largest = max((max(ids) for example in examples for ids in _ids(example) if ids), default=0)
    for token in (largest, padding):
        check_token(token, rows, tokenizer)


def check_token(token: int, rows: int, tokenizer: Any = None) -> None:
    """ValueError where a token id is none of a model's ``rows`` of embeddings."""
    if token < rows:
        return
    convert = getattr(tokenizer, "convert_ids_to_tokens", lambda _: None)
    text = convert(token)
    raise ValueError(
        f"the token {token if text is None else f'{text!r} ({token})'} has no row in the model's embeddings, which have {rows}: add rows "
        "by model.resize_token_embeddings(len(tokenizer)) and save the model with its tokenizer, or take the tokenizer that the model was "
        "trained with."
    )


def _ids(example: Mapping[str, Any]) -> Iterator[list[int]]:
    for name in ("prompt_ids", "completion_ids", "input_ids"):
        if name in example:
            yield example[name]
    yield from example.get("option_ids", ())
