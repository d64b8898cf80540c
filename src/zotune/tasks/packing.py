"""Texts packed into blocks of one length, across their borders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

#: Tokens of a block where a model's context is longer, as in transformers' and TRL's defaults.
USUAL_BLOCK = 1024


def packed(examples: Iterable[Mapping[str, Any]], block: int) -> Iterator[dict[str, Any]]:
    """Examples of ``block`` input tokens from encoded texts, one behind the other, each with its end-of-text token.

    A block begins with the last token of the one before, so that every token but the first is scored once. The last block may be shorter.

    Args:
        examples: ``{"prompt_ids", "completion_ids"}`` of texts.
        block: input tokens.
    """
    ids: list[int] = []
    for example in examples:
        ids += [*example["prompt_ids"], *example["completion_ids"]]
        while len(ids) > block:
            yield {"prompt_ids": ids[:1], "completion_ids": ids[1 : block + 1]}
            ids = ids[block:]
    if len(ids) > 1:
        yield {"prompt_ids": ids[:1], "completion_ids": ids[1:]}


def block_of(limit: int | None, *, users: bool) -> int:
    """Input tokens of a block: the length that the user gave, else the model's context, at most :data:`USUAL_BLOCK`."""
    return limit if limit is not None and users else min(limit or USUAL_BLOCK, USUAL_BLOCK)


def check_packing(tokenizer: Any, form: str, *, truncate: bool, chosen: bool) -> None:
    """ValueError where rows cannot be packed.

    Args:
        tokenizer: of the texts.
        form: first column of the rows' form.
        truncate: whether long rows are cut.
        chosen: whether the rows are of a task, or for another loss than that of texts.
    """
    if chosen or form != "text":
        raise ValueError("packing joins plain texts, and these rows have answers of their own: leave packing out.")
    if truncate:
        raise ValueError("packing cuts texts into blocks and drops nothing, so truncate would have no effect: leave one of them out.")
    if tokenizer.eos_token_id is None:
        raise ValueError("packing puts the end-of-text token between texts, and the tokenizer has none: set tokenizer.eos_token.")
