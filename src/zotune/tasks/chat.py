"""Chats as text, by the tokenizer's chat template, with the assistant's messages marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chat up to the last message of the assistant; ValueError where there is none or it is malformed."""
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
        raise ValueError('column \'messages\' must hold a list of {"role": ..., "content": ...}.')
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise ValueError("no message has the role 'assistant', so there is nothing to learn from.")
    return messages[: last + 1]


def assistant_parts(tokenizer: Any, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The chat as pieces (text, whether it is scored), the first unscored.

    A message's text is what the template adds after its generation prompt. Where the template rewrites earlier messages (drops their
    reasoning, say), only unchanged messages are scored; the last one always is.
    """
    whole = _chat_text(tokenizer, messages, False)
    parts: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _chat_text(tokenizer, messages[:index], True) if index else ""
        end = _chat_text(tokenizer, messages[: index + 1], False)
        final = index == len(messages) - 1
        if final and not end.startswith(start):
            start = _chat_text(tokenizer, messages[:index], False)
        if not (end.startswith(start) and whole.startswith(end) and done <= len(start) < len(end)):
            if final:
                raise ValueError("the tokenizer's chat template does not keep the last message at the end of the chat.")
            continue
        parts += [(whole[done : len(start)], False), (whole[len(start) : len(end)], True)]
        done = len(end)
    return parts


def _chat_text(tokenizer: Any, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, which the column 'messages' needs: use a chat model's tokenizer, or "
            "prompt and completion columns."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # whatever the template itself raises, e.g. that roles must alternate
        raise ValueError(f"the tokenizer's chat template refuses these messages ({error}).") from None
