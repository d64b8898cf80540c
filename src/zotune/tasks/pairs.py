"""Pairs of an instruction and an answer in the forms that they are published in, as chats or as texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zotune.tasks.rows import Rows
from zotune.tasks.sharegpt import messages_of, tools_of

#: The prompts of Stanford Alpaca, for tokenizers without a chat template.
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def are_chats(rows: Rows, columns: tuple[str, ...], tokenizer: Any) -> bool:
    """Whether rows of a form (:func:`zotune.tasks.columns.format_of`) become chats.

    Messages and conversations do, prompts and completions that are lists of messages, and instructions for a tokenizer with a chat
    template.
    """
    if columns[0] == "instruction":
        return bool(getattr(tokenizer, "chat_template", None))
    return columns[0] in ("messages", "conversations") or (columns[0] == "prompt" and isinstance(rows[0]["prompt"], list))


def chat_row(row: Mapping[str, Any], form: str) -> Mapping[str, Any]:
    """A row of :func:`are_chats` with `messages`, of which those of a completion are trained on; ValueError where it is malformed."""
    if form == "messages":
        return row
    if form == "conversations":
        return {**row, "messages": messages_of(row), "tools": tools_of(row)}
    if form == "prompt":
        for name in ("prompt", "completion"):
            if not isinstance(row[name], list) or not all(isinstance(message, dict) for message in row[name]):
                raise ValueError(f"column {name!r} holds no list of messages, as the first row's prompt does: write all rows alike.")
        before = [{**each, "train": False} if each.get("role") == "assistant" else each for each in row["prompt"]]
        return {**row, "messages": [*before, *row["completion"]]}
    parts = [text_of(row, "instruction"), *([text_of(row, "input")] if row.get("input") else [])]
    system = [{"role": "system", "content": text_of(row, "system")}] if row.get("system") else []
    turns = [{"role": "user", "content": "\n".join(parts)}, {"role": "assistant", "content": text_of(row, "output")}]
    return {"messages": [*system, *turns]}


def text_row(row: Mapping[str, Any], form: str) -> Mapping[str, Any]:
    """A row with `prompt` and `completion`; an instruction's prompt is Alpaca's. ValueError where it is malformed."""
    if form == "prompt":
        return row
    if row.get("system"):
        raise ValueError("column 'system' needs a chat template, and the tokenizer has none: leave it out with --columns system= .")
    texts = {name: text_of(row, name) for name in ("instruction", "input") if row.get(name) or name == "instruction"}
    prompt = (ALPACA_INPUT if "input" in texts else ALPACA).format(**texts)
    return {"prompt": prompt, "completion": text_of(row, "output")}


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text of a column; ValueError where it holds none."""
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {'null' if value is None else type(value).__name__}, not a string.")
    if column in ("instruction", "output") and not value.strip():
        raise ValueError(f"column {column!r} is empty: leave the row out, or write what belongs there.")
    return value
