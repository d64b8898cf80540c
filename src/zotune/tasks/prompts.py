"""Prompts whose completions are rewarded: rows → encoded prompts, their batches, and the tokens that end a completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zotune.tasks.chat import prompt_chat_of
from zotune.tasks.chat_template import ChatTemplate
from zotune.tasks.encoding import Encoder
from zotune.tasks.sources import Rows
from zotune.tasks.task import Task

#: Columns that no reward function gets: the prompt is its own argument, and a completion is what is generated.
NOT_HANDED_ON = ("prompt", "completion", "completion_ids")
#: Tokens of a completion that names an option of a task.
LONGEST_OPTION = 16
#: Column of the texts of a task's right answers.
REFERENCE = "reference"


@dataclass(frozen=True)
class RewardCollator:
    """Batches of prompts, for :class:`zotune.rewards.objective.RewardLoss`.

    prompt_ids (B, P) and prompt_mask (B, P), padded on the left; prompt_number (B,), each prompt's index in its data set; rows, a list of
    each one's prompt and columns.

    Attributes:
        pad_token_id: id of the padding, which is masked.
        pad_to_multiple_of: round P up to a multiple of this.
        stops: tokens that end a completion, beside those of the model.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    stops: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        prompts = [example["prompt_ids"] for example in examples]
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(map(len, prompts)) // multiple) * multiple
        return {
            "prompt_ids": torch.tensor([[self.pad_token_id] * (length - len(ids)) + list(ids) for ids in prompts]),
            "prompt_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]),
            "prompt_number": torch.tensor([example["number"] for example in examples]),
            "rows": [{"prompt": example["prompt"], "columns": example["columns"]} for example in examples],
        }


def encode_prompts(encoder: Encoder, rows: Rows, task: Task | None = None, *, max_completion_length: int) -> list[dict[str, Any]]:
    """Examples ``{"prompt_ids", "prompt", "columns", "number"}`` of rows, as for TRL's GRPO.

    A row's `prompt` is a text or messages, which become the chat template's text with its generation prompt. A task's prompt is what it
    renders, and `reference` is added to the columns: the texts of the right answers.

    Args:
        encoder: tokenizer, length limit, tools and variables of chat templates.
        rows: to encode.
        task: whose prompts these are; None: the rows have prompts of their own.
        max_completion_length: tokens that must fit behind a prompt.

    Raises:
        ValueError: no prompt, an empty one, one too long, or an invalid chat; the message names the row.
    """
    names = [] if task is not None else _columns(rows)
    template = ChatTemplate(encoder.tokenizer)
    kinds: set[type] = set()

    def encode(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        if task is not None:
            prompt, columns = task.render(row)[0], {**row, REFERENCE: list(task.references(row))}
        else:
            prompt, columns = row["prompt"], {name: row.get(name) for name in names}
        kinds.add(type(prompt))
        if len(kinds) > 1:
            raise ValueError("column 'prompt' holds messages in some rows and texts in others: write all of them alike.")
        ids = encoder.fit_prompt(
            _ids(encoder, template, prompt, row), max_completion_length, "its longest completion (max_completion_length)"
        )
        return {"prompt_ids": ids, "prompt": prompt, "columns": columns, "number": number}

    try:
        return encoder.map_rows(rows, encode, range(len(rows)), rows)
    finally:
        template.close()


def stop_tokens(encoder: Encoder, examples: Sequence[Mapping[str, Any]], task: Task | None) -> tuple[int, ...]:
    """Ids of the tokens that end a completion of encoded prompts, beside those of the model.

    The tokenizer's end of text; of a task's answers also the line break, and of chats what the template writes behind an answer.
    """
    ends: list[int | None] = [*encoder.answer_ends()] if task is not None else [encoder.tokenizer.eos_token_id]
    if examples and not isinstance(examples[0]["prompt"], str):
        ends.append(_turn_end(encoder, examples[0]["prompt"]))
    return tuple(dict.fromkeys(int(end) for end in ends if end is not None))


def longest_answer(task: Task) -> int:
    """Most tokens of a completion that answers a task."""
    return task.max_new_tokens or LONGEST_OPTION


def is_chat(examples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the prompts are messages."""
    return bool(examples) and not isinstance(examples[0]["prompt"], str)


def _columns(rows: Rows) -> list[str]:
    """The columns of any row that reward functions get."""
    if "prompt" not in rows.columns:
        fix = "write the messages as 'prompt', without the answer" if "messages" in rows.columns else "give every row one, or pass --task"
        raise ValueError(f"{rows.source} has no column 'prompt', which a reward needs, in every row: {fix}.")
    names = rows.columns if hasattr(rows.rows, "column_names") else [name for row in rows for name in row]
    return [name for name in dict.fromkeys(names) if name not in NOT_HANDED_ON]


def _ids(encoder: Encoder, template: ChatTemplate, prompt: Any, row: Mapping[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty, so there is nothing to complete: write a prompt.")
        return encoder.prompts([prompt])[0]
    text = template.text(prompt_chat_of(prompt, row, encoder.chat), generation_prompt=True)
    return list(encoder.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def _turn_end(encoder: Encoder, messages: list[dict[str, Any]]) -> int | None:
    """The special token that the chat template writes behind an answer; None where it writes none."""
    marker, tokenizer = "ZOTUNE7ANSWER", encoder.tokenizer
    template = ChatTemplate(tokenizer)
    try:
        answered = [*messages, {"role": "assistant", "content": marker}]
        behind = template.text(prompt_chat_of(answered, {}, encoder.chat, answered=True)).rpartition(marker)[2]
    finally:
        template.close()
    ids = tokenizer(behind.strip(), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return ids[0] if ids and ids[0] in special else None
