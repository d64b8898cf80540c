"""A tokenizer's chat template, run within limits: the text of a chat, and which of its characters are trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from zotune.io.limited import Limited
from zotune.tasks.chat import Chat, with_parsed_arguments

#: Most characters of a rendered chat.
LONGEST_TEXT = 1 << 26

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = "ZOTUNE7CONTENT"


class ChatTemplate:
    """Renders chats by a tokenizer's template, in a child process with bounded time and memory.

    Raises:
        ValueError: by its methods, for a tokenizer without a template, a template that refuses the messages or exceeds the limits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._limited = Limited(self._render, "the tokenizer's chat template")

    def close(self) -> None:
        """Ends the child process."""
        self._limited.close()

    def text(self, chat: Chat, *, until: int | None = None, generation_prompt: bool = False) -> str:
        """The text of the messages before ``until``, by default of all."""
        return self._call(chat, chat.messages[:until], generation_prompt, False)[0]

    def generated(self, chat: Chat, text: str) -> list[tuple[int, int]] | None:
        """The characters that the template itself marks as generated; None where it marks none."""
        if not _GENERATION.search(self._source(chat)):
            return None
        found, spans = self._call(chat, chat.messages, False, True)
        return spans if found == text and spans else None

    def reads(self, chat: Chat, name: str) -> bool:
        """Whether a variable, or a key of the messages, can be found in the template's source."""
        return re.search(rf"\b{re.escape(name)}\b", self._source(chat)) is not None

    def with_arguments(self, chat: Chat) -> Chat:
        """The chat with the arguments of tool calls in the form that the template writes as JSON: objects, else texts."""
        parsed = with_parsed_arguments(chat.messages)
        if parsed == chat.messages:
            return chat
        objects = Chat(parsed, chat.trained, chat.details, chat.tools, chat.variables)
        try:
            text = self.text(objects)
        except ValueError:
            return chat
        dicts = [f.get("arguments") for message in parsed for call in message.get("tool_calls") or () if (f := call.get("function", call))]
        as_python = [repr(each) for each in dicts if isinstance(each, dict) and each and repr(each) != json.dumps(each)]
        return chat if any(each in text for each in as_python) else objects

    def content(self, chat: Chat, index: int, text: str) -> tuple[int, int, int]:
        """Where the content of a message, a text, is in the chat's text: (start, end, characters cut from its beginning)."""
        original: str = chat.messages[index]["content"]
        messages = [dict(message) for message in chat.messages]
        messages[index]["content"] = _MARKER
        before, _, after = self._call(chat, messages, False, False)[0].partition(_MARKER)
        end = len(text) - len(after)
        found = text[len(before) : end]
        cut = original.find(found) if found.strip() == original.strip() else -1
        if cut < 0 or not (text.startswith(before) and text.endswith(after)):
            raise ValueError(f"the tokenizer's chat template rewrites the content of message {index + 1}, so parts of it cannot be marked.")
        return len(before), end, cut

    def _source(self, chat: Chat) -> str:
        try:
            return str(self.tokenizer.get_chat_template(None, chat.tools))
        except Exception as error:
            raise _refused(error) from None

    def _call(self, chat: Chat, messages: list[dict[str, Any]], prompt: bool, spans: bool) -> tuple[str, Any]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template, which the column 'messages' needs: use a chat model's tokenizer, or "
                "prompt and completion columns."
            )
        try:
            return self._limited(messages, chat.tools, dict(chat.variables), prompt, spans)
        except ValueError as error:  # whatever the template itself raises, e.g. that roles must alternate
            raise _refused(error) from None

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, variables: Mapping[str, Any], prompt: bool, spans: bool
    ) -> tuple[str, Any]:
        """In the child process."""
        if not spans:
            text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **variables)
        else:
            from transformers.utils.chat_template_utils import render_jinja_template

            template = self.tokenizer.get_chat_template(None, tools)
            known = [{key: value for key, value in message.items() if value is not None} for message in messages]
            names = {**self.tokenizer.special_tokens_map, **variables}
            (text,), (found,) = render_jinja_template(
                [known], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **names
            )
            return str(text), [(int(start), int(end)) for start, end in found]
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"it writes a chat of {len(text)} characters, and at most {LONGEST_TEXT} are possible")
        return str(text), None


def _refused(error: Exception) -> ValueError:
    return ValueError(f"the tokenizer's chat template refuses these messages ({' '.join(str(error).split())}).")


def scored_characters(template: ChatTemplate, chat: Chat) -> tuple[str, bytearray, bool]:
    """The text of a chat, 1 for each of its characters that is trained on, and whether a message had to be left out.

    A message of the assistant is what the template marks as generated, else what it adds after its generation prompt. Where the template
    rewrites earlier messages (drops their reasoning, say), only unchanged messages are trained on; the last one always is. Of another
    message the content is trained on.
    """
    text = template.text(chat)
    marks, left_out = bytearray(len(text)), False
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    generated = template.generated(chat, text)
    spans: dict[int, tuple[int, int]] = {}
    if generated is not None and len(generated) == len(answers):
        spans = dict(zip(answers, generated, strict=True))
    elif generated is not None and all(chat.trained[index] and not chat.details[index] for index in answers):
        for start, end in generated:
            marks[start:end] = b"\1" * (end - start)
        answers = []
    done = 0
    for index, trained in enumerate(chat.trained):
        wanted = trained or any(whether for *_, whether in chat.details[index])
        if not wanted or (chat.messages[index]["role"] == "assistant" and index not in answers):
            continue
        if chat.messages[index]["role"] == "assistant":
            span = spans.get(index) or _answer(template, chat, index, text, done)
            if span is None:
                left_out = True
                continue
            done = span[1]
            if trained:
                marks[span[0] : span[1]] = b"\1" * (span[1] - span[0])
        if (trained and chat.messages[index]["role"] != "assistant") or chat.details[index]:
            if not isinstance(chat.messages[index].get("content"), str):
                raise ValueError(f"message {index + 1} is marked to be trained on, and its content is no text.")
            start, end, cut = template.content(chat, index, text)
            if chat.messages[index]["role"] != "assistant":
                marks[start:end] = bytes([trained]) * (end - start)
            for first, after, whether in chat.details[index]:
                first, after = (min(max(start, start + place - cut), end) for place in (first, after))
                marks[first:after] = bytes([whether]) * (after - first)
    return text, marks, left_out


def _answer(template: ChatTemplate, chat: Chat, index: int, text: str, done: int) -> tuple[int, int] | None:
    """The characters of an assistant's message; None where the template rewrites it."""
    start = template.text(chat, until=index, generation_prompt=True) if index else ""
    final = index == len(chat.messages) - 1
    end = text if final else template.text(chat, until=index + 1)
    if final and not end.startswith(start):
        start = template.text(chat, until=index)
    if end.startswith(start) and text.startswith(end) and done <= len(start) < len(end):
        return len(start), len(end)
    if final:
        raise ValueError("the tokenizer's chat template does not keep the last message at the end of the chat.")
    return None
