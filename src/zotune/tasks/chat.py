"""Chats of data rows, checked: messages, tools, variables of the template, and which messages are trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

#: Most bytes of a file of tools.
LONGEST_TOOLS = 1 << 24
#: Columns of a row with a chat that have an effect.
COLUMNS = ("messages", "tools", "chat_template_kwargs")
#: Keys of a message that mark what is trained on; the template does not see them.
MARKS = ("weight", "train", "training", "train_detail")

# Arguments of `apply_chat_template` that are no variables of a template.
_RESERVED = {
    "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "messages",
}  # fmt: skip


@dataclass(frozen=True)
class ChatOptions:
    """What the command says about chats; a row's own columns come first.

    Attributes:
        tools: JSON schemas of the tools.
        variables: further variables of the chat template, such as ``{"enable_thinking": False}``.
    """

    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """A chat up to the last message that may be trained on.

    Attributes:
        messages: as the template gets them.
        trained: of each message, whether it is trained on.
        details: of each message, stretches of its content that are or are not: (begin, end, whether), characters, the end excluded.
        tools, variables: for the template.
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    details: list[list[tuple[int, int, bool]]]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def without(self, indices: set[int]) -> Chat:
        """The chat without some of its messages."""
        kept = [index for index in range(len(self.messages)) if index not in indices]
        return replace(
            self,
            messages=[self.messages[index] for index in kept],
            trained=[self.trained[index] for index in kept],
            details=[self.details[index] for index in kept],
        )


def chat_of(row: Mapping[str, Any], options: ChatOptions | None = None) -> Chat:
    """The chat of a row; ValueError where it is malformed, or where nothing is trained on."""
    options = options or ChatOptions()
    messages = from_json(row["messages"])  # a column of a CSV file is text
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            'column \'messages\' must hold a list of {"role": ..., "content": ...}; an answer with tool_calls may lack the content.'
        )
    marks = [_marks(message, f"message {number} ({message['role']})") for number, message in enumerate(messages, 1)]
    last = max((i for i, (trained, _) in enumerate(marks) if trained or messages[i]["role"] == "assistant"), default=-1)
    if last < 0:
        raise ValueError("no message has the role 'assistant', so there is nothing to learn from.")
    if not any(trained or any(whether for *_, whether in details) for trained, details in marks):
        raise ValueError("every message of the assistant has the weight 0, so there is nothing to learn from: leave the row out.")
    bare = [{key: value for key, value in message.items() if key not in MARKS} for message in messages[: last + 1]]
    return Chat(bare, [trained for trained, _ in marks[: last + 1]], [each for _, each in marks[: last + 1]], *_given(row, options))


def prompt_chat_of(messages: Any, row: Mapping[str, Any], options: ChatOptions | None = None, *, answered: bool = False) -> Chat:
    """The chat of a prompt's messages, which ends before the assistant's answer; ValueError where it is malformed.

    Args:
        messages: a list of messages.
        row: with tools and template variables of its own, if any.
        options: for rows without.
        answered: the answer is there.
    """
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError('column \'prompt\' must hold a text, or a list of {"role": ..., "content": ...}.')
    if messages[-1]["role"] == "assistant" and not answered:
        raise ValueError("the last message of the prompt is the assistant's, whose answer is to be generated: end it with the user's.")
    bare = [{key: value for key, value in message.items() if key not in MARKS and value is not None} for message in messages]
    return Chat(bare, [False] * len(bare), [[] for _ in bare], *_given(row, options or ChatOptions()))


def variables_of(value: Any) -> dict[str, Any]:
    """Variables of a chat template, from an object or its JSON; ValueError for anything else."""
    value = from_json(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f'chat_template_kwargs must be an object such as {{"enable_thinking": false}}, not {_shown(value)}.')
    reserved = sorted(_RESERVED & value.keys())
    if reserved:
        raise ValueError(f"chat_template_kwargs cannot set {reserved[0]!r}, which is no variable of a template: leave it out.")
    return {name: each for name, each in value.items() if each is not None}


def read_tools(path: str | Path) -> list[dict[str, Any]] | None:
    """The tools of a JSON file; ValueError where it is no list of JSON schemas."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(LONGEST_TOOLS + 1)
        if len(content) > LONGEST_TOOLS:
            raise ValueError(f"it is longer than {LONGEST_TOOLS} bytes")
        return _tools(json.loads(content))
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}.".replace("..", ".")) from None


def with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of their tool calls as objects, where they are the JSON of one (as OpenAI writes them)."""

    def call(value: Any) -> Any:
        function = value.get("function", value) if isinstance(value, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        parsed = from_json(arguments) if isinstance(arguments, str) else None
        if not isinstance(function, dict) or not isinstance(parsed, dict):
            return value
        changed = {**function, "arguments": parsed}
        return {**value, "function": changed} if "function" in value else changed

    return [
        {**message, "tool_calls": [call(each) for each in message["tool_calls"]]} if message.get("tool_calls") else message
        for message in messages
    ]


def _given(row: Mapping[str, Any], options: ChatOptions) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """Tools and template variables: a row's own, else those of the options."""
    tools = _tools(row["tools"]) if row.get("tools") is not None else options.tools
    own = row.get("chat_template_kwargs")
    return tools, {**options.variables, **({} if own is None else variables_of(own))}


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return False
    if content is None:
        return bool(calls) or ("content" in message and message["role"] == "assistant" and _has_reasoning(message))
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content))


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return any(message.get(key) for key in ("reasoning_content", "reasoning", "thinking", "function_call"))


def _marks(message: Mapping[str, Any], where: str) -> tuple[bool, list[tuple[int, int, bool]]]:
    """Whether a message is trained on, by its marks or its role; and the stretches of `train_detail`."""
    if message.get("function_call") is not None:
        raise ValueError(f"{where} has a 'function_call', which chat templates no longer read: write it as 'tool_calls'.")
    assistant, marks = message["role"] == "assistant", {}
    for name in ("weight", "train", "training"):
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{where} has {name!r} {_shown(value)}: only 0 (not trained on) and 1 are possible.")
        marks[name] = bool(value)
    if not assistant and marks.get("weight"):
        raise ValueError(f'{where} has the weight 1, and a weight is of an assistant\'s message: write "train": true to train on this one.')
    if len(set(marks.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(map(repr, marks))} contradict each other: give one of them.")
    trained = next(iter(marks.values()), assistant)
    return trained, _details(message, where)


def _details(message: Mapping[str, Any], where: str) -> list[tuple[int, int, bool]]:
    details = message.get("train_detail")
    if details is None:
        return []
    content = message.get("content")
    shape = '"train_detail" is a list of {"begin_offset": 0, "end_offset": 8, "train": false} over the characters of a text content'
    if not isinstance(details, list) or not isinstance(content, str):
        raise ValueError(f"{where}: {shape}.")
    found = []
    for each in details:
        begin, end, train = (each.get(key) for key in ("begin_offset", "end_offset", "train")) if isinstance(each, dict) else (None,) * 3
        if type(begin) is not int or type(end) is not int or not isinstance(train, bool) or not 0 <= begin <= end < len(content):
            raise ValueError(f"{where}: {shape}, of which it has {len(content)}; the end is included.")
        found.append((begin, end + 1, train))
    return found


def _tools(value: Any) -> list[dict[str, Any]] | None:
    value = from_json(value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("tools must be a list of JSON schemas, one object per tool (or the JSON of such a list).")
    return value or None


def from_json(value: Any) -> Any:
    """The value of a JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
