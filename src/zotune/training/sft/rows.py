"""Rows in TRL's formats as the tokens that TRL trains on, with the mask of those that are scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.trainer_utils import has_length

from zotune.tasks.chat_tokens import ChatTokens
from zotune.tasks.sources import Rows
from zotune.training.sft.blocks import blocks, scored_example

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """How TRL reads a row, by the fields of its `SFTConfig`.

    A row is a `text`; or a `prompt` and its `completion`, both texts or both messages; or `messages` (or `conversations`). A text and a
    completion end with the tokenizer's end token. More than `max_length` tokens are cut from the end, or where rows are packed begin the
    next block (:mod:`zotune.training.sft.blocks`).

    Attributes:
        tokenizer: of the model.
        text_field: the column with the text.
        max_length: most tokens of a row; None: no limit.
        completion_only: score the completion alone; None: where there is one.
        assistant_only: of messages, score the assistant's alone, wherever the chat template puts them.
        format_row: row → text, in place of the columns.
    """

    tokenizer: Any
    text_field: str = "text"
    max_length: int | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    format_row: Callable[[Row], str] | None = None

    def encoded(self, dataset: Any, source: str, packing: bool = False) -> Any:
        """The examples of a data set, a list (of a stream: a stream); tokenized rows as they are.

        Args:
            dataset: rows, or data sets by name.
            source: its name, for messages.
            packing: whether rows are packed into blocks of `max_length` tokens.

        Raises:
            ValueError: naming the row, for one that is malformed, or of which nothing is scored.
        """
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            return {name: self.encoded(part, f"{source} {name!r}", packing) for name, part in dataset.items()}
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{source} has no rows.")
        if "input_ids" in first:
            if packing:
                raise ValueError(f"{source} has rows with input_ids, which are taken as they are: leave packing out, or pack them before.")
            return dataset
        if {"image", "images"} & first.keys():
            raise ValueError(f"{source} has images, which SFTTrainer does not read here: use zotune.ZOTrainer with a collator of your own.")
        if self.completion_only and (self.format_row is not None or "completion" not in first):
            raise ValueError(f"completion_only_loss=True needs the columns prompt and completion, and {source} has {', '.join(first)}.")
        if self.assistant_only and not self._is_chat(first):
            raise ValueError(f"assistant_only_loss=True needs messages, and {source} has {', '.join(first)}.")
        chats = ChatTokens(self.tokenizer, None, lambda fact: None) if self.assistant_only else None
        try:
            if not has_length(dataset):
                if packing:
                    raise ValueError(f"{source} is a stream, whose rows cannot be packed here: leave packing out, or load the rows.")
                return dataset.map(lambda row: self._checked(row, chats), remove_columns=list(first))
            rows = Rows(dataset, source, range(len(dataset)), "row")
            if packing:
                assert self.max_length is not None
                return blocks(rows.map(lambda row: self.example(row, chats, whole=True)), self.max_length, source)
            return rows.map(lambda row: self._checked(row, chats))
        finally:
            if chats is not None and has_length(dataset):
                chats.close()

    def example(self, row: Row, chats: ChatTokens | None = None, *, whole: bool = False) -> tuple[list[int], list[bool]]:
        """Tokens of a row, cut to `max_length` unless it stays whole, and whether each is scored; ``chats`` with `assistant_only`."""
        if self.format_row is not None:
            row = {self.text_field: self.format_row(row)}
        row = {name: _with_roles(value) for name, value in row.items()}
        if "conversations" in row:
            row["messages"] = row.pop("conversations")
        if chats is not None:
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            ids, scored, _ = chats.of_row({**row, "messages": messages}, None)
        elif "prompt" in row and "completion" in row:
            before, ids = self._prompt_and_completion(row)
            same = next(
                (place for place, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), min(len(before), len(ids))
            )
            scored = [place >= same or self.completion_only is False for place in range(len(ids))]
        elif "messages" in row:
            ids = self._chat(row, row["messages"])
            scored = [True] * len(ids)
        elif self.text_field in row:
            ids = self._text(_text(row, self.text_field), ends=True)
            scored = [True] * len(ids)
        else:
            raise ValueError(f"a row needs {self.text_field!r}, 'messages', or 'prompt' and 'completion', and has {', '.join(row)}.")
        return (ids, scored) if whole else (ids[: self.max_length], scored[: self.max_length])

    def _checked(self, row: Row, chats: ChatTokens | None) -> dict[str, Any]:
        example = scored_example(*self.example(row, chats))
        if example is None:
            raise ValueError("nothing to score: it is empty, or cut away by max_length.")
        return example

    def _prompt_and_completion(self, row: Row) -> tuple[list[int], list[int]]:
        if self._is_chat(row):
            return self._chat(row, row["prompt"], add_generation_prompt=True), self._chat(row, [*row["prompt"], *row["completion"]])
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        return self._text(prompt), self._text(prompt + completion, ends=True)

    def _text(self, text: str, ends: bool = False) -> list[int]:
        end = self.tokenizer.eos_token
        if ends and end is not None and not text.endswith(end):
            text += end
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def _chat(self, row: Row, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options |= row.get("chat_template_kwargs") or {}
        try:
            found = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True, **options)
        except Exception as error:  # whatever a template raises
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        return list(found["input_ids"])

    @staticmethod
    def _is_chat(row: Row) -> bool:
        return isinstance(row.get("messages", row.get("conversations", row.get("prompt"))), list)


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} holds {type(row[column]).__name__}, not a string.")
    return row[column]


def _with_roles(value: Any) -> Any:
    """Messages that say `from` and `value`, with `role` and `content`."""
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        return value
    names = {"from": "role", "value": "content"}
    return [{names.get(key, key): item for key, item in each.items()} for each in value]
