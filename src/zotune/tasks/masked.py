"""Prompts with a mask, of masked language models: token ids, the mask's position, and label words.

As in LM-BFF (2012.15723), by whose code MeZO (2305.17333) trains RoBERTa: every column and every text between columns is tokenized alone,
and a label word is one token with a blank before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zotune.io.text import shown
from zotune.tasks.chat_tokens import CUT
from zotune.tasks.encoding import Encoder
from zotune.tasks.sources import Rows
from zotune.tasks.task import MASK, Task

#: Name of the template that is used where none is chosen.
TEMPLATE = "mask"
#: Tokens that the first of several texts leaves to the others where it is cut, as in MeZO's code (240 of 256).
REST = 16


def encode_masked(encoder: Encoder, rows: Rows, task: Task) -> list[dict[str, Any]]:
    """Examples ``{"prompt_ids", "mask_position", "option_ids", "answer"}``; each option is its label word's one token.

    Args:
        encoder: tokenizer and length limit; ``truncate`` cuts the ends of columns' texts, never the mask.
        rows: to encode.
        task: its prompt has one ``<mask>``.

    Raises:
        ValueError: the tokenizer has no mask, the prompt has none or several, a label word is no single token; or, naming the row, its text
            holds a mask or is too long.
    """
    if encoder.tokenizer.mask_token_id is None:
        raise ValueError(
            "the tokenizer has no mask token, so its model fills no masks: take an encoder such as BERT or RoBERTa, or another objective."
        )
    _check_prompt(task)
    words = label_words(encoder.tokenizer, task)
    prompt = _MaskedPrompt(encoder)

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        ids, position = prompt.ids(task.pieces(row), task.demonstrations(row))
        return {"prompt_ids": ids, "mask_position": position, "option_ids": [[word] for word in words], "answer": task.answer(row)}

    return encoder.map_rows(rows, encode)


def label_words(tokenizer: Any, task: Task) -> list[int]:
    """The token of each option, with a blank before it.

    Raises:
        ValueError: an option is no single token of the vocabulary, or two are the same.
    """
    found: dict[int, str] = {}
    for option in task.options:
        word = option.strip()
        ids = tokenizer(f" {word}", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = f"the tokens {tokenizer.convert_ids_to_tokens(ids)}" if len(ids) != 1 else "no token"
            raise ValueError(
                f"the label word {word!r} is {pieces} of this tokenizer, and a mask stands for one: choose other words with --options."
            )
        if ids[0] in found:
            raise ValueError(f"the label words {found[ids[0]]!r} and {word!r} are the same token: choose others with --options.")
        found[ids[0]] = word
    return list(found)


def _check_prompt(task: Task) -> None:
    if not task.fixed_options:
        raise ValueError(f"task {task.name!r} has answers of its own in every row, for which no label words can stand: use a causal model.")
    count = task.prompt.count(MASK)
    if not count:
        known = f"--template {TEMPLATE}" if TEMPLATE in task.templates else "one such as --template '{sentence} It was<mask>.'"
        raise ValueError(f"the prompt {shown(task.prompt)} has no {MASK} for a label word: choose {known}.")
    if count > 1:
        raise ValueError(f"the prompt {shown(task.prompt)} has {count} masks, and one label word is scored: write one {MASK}.")


class _MaskedPrompt:
    """Tokenizes pieces of a prompt and puts them together."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._literals: dict[str, list[int]] = {}

    def ids(self, pieces: Sequence[tuple[str | None, str]], demonstrations: str = "") -> tuple[list[int], int]:
        """Token ids with the special tokens around a text, and the mask's index; ``pieces``: (column or None, text)."""
        before, after = self.encoder.affixes
        parts, texts = [before, self._text(demonstrations)], []  # `texts`: places in `parts` of columns
        mask, blank = 0, ""
        for column, text in pieces:
            if column is not None:
                texts.append(len(parts))
                parts.append(self._text(blank + text if text else ""))
                blank = ""
                continue
            left, found, right = text.partition(MASK)
            if found:
                parts.append(self._literal(left.rstrip(" ")))  # the label word has a blank of its own
                mask = len(parts)
                parts.append([self.encoder.tokenizer.mask_token_id])
            rest = right if found else left
            literal = rest.rstrip(" ")  # a blank before a column belongs to the column's first word
            blank = rest[len(literal) :]
            parts.append(self._literal(literal))
        parts.append(after)
        self._fit(parts, texts)
        return [token for part in parts for token in part], sum(map(len, parts[:mask]))

    def _text(self, text: str) -> list[int]:
        ids = self.encoder.ids(text) if text else []
        if self.encoder.tokenizer.mask_token_id in ids:
            raise ValueError(f"its text holds the mask token {self.encoder.tokenizer.mask_token!r} itself: remove it from the text.")
        return ids

    def _literal(self, text: str) -> list[int]:
        if text not in self._literals:
            tokenizer = self.encoder.tokenizer
            ids = self.encoder.ids(text) if text else []
            single = tokenizer.convert_tokens_to_ids(text) if len(text) == 1 else None
            if single is not None and single != tokenizer.unk_token_id:
                ids = [single]  # without a blank that SentencePiece would add
            self._literals[text] = ids
        return self._literals[text]

    def _fit(self, parts: list[list[int]], texts: Sequence[int]) -> None:
        """Cut the texts where the prompt exceeds the limit: the first of several to leave 16 tokens, then from the last one's end."""
        limit, encoder = self.encoder.limit, self.encoder
        length = sum(map(len, parts))
        if limit is None:
            return
        if length > limit and not encoder.truncate:
            raise ValueError(encoder.too_long(f"the prompt has {length} tokens"))
        kept = {place: len(parts[place]) for place in texts}
        if encoder.truncate and len(texts) > 1:
            kept[texts[0]] = min(kept[texts[0]], max(1, limit - REST))
        excess = length - sum(len(parts[place]) - kept[place] for place in texts) - limit
        for place in reversed(texts):
            cut = min(max(0, excess), kept[place])
            kept[place] -= cut
            excess -= cut
        if excess > 0 or (texts and not any(kept.values())):
            fixed = length - sum(len(parts[place]) for place in texts)
            raise ValueError(encoder.too_long(f"the prompt has {fixed} tokens without its texts", cut=False))
        for place in texts:
            if kept[place] < len(parts[place]):
                encoder.facts.add(CUT)
                parts[place] = parts[place][: kept[place]]
