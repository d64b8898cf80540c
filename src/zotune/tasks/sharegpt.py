"""Chats in ShareGPT's form, `conversations` of turns with `from` and `value`, as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zotune.io.suggest import did_you_mean
from zotune.tasks.chat import from_json

#: Names of speakers as they are published, and the roles of chat templates.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
#: The speaker whose value is the JSON of the calls that the assistant makes.
CALL = "function_call"


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row with `conversations`, behind one of its `system` column where it has no such turn.

    A turn may have the keys of messages instead (`role`, `content`); all its other keys stay.

    Raises:
        ValueError: naming the turn, for one that is malformed or whose speaker is unknown.
    """
    turns = from_json(row["conversations"])  # a column of a CSV file is text
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError('column \'conversations\' must hold a list of {"from": ..., "value": ...}.')
    messages = [_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"column 'system' holds {type(system).__name__}, not a string.")
    if system and messages[0]["role"] == "system":
        raise ValueError("the column 'system' and a first turn of 'system' are both there: leave one of them out.")
    return [{"role": "system", "content": system}, *messages] if system else messages


def tools_of(row: Mapping[str, Any]) -> Any:
    """The row's tools; None for an empty text, as published sets have it."""
    tools = row.get("tools")
    return None if isinstance(tools, str) and not tools.strip() else tools


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    kept = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if "from" not in turn:
        if not isinstance(turn.get("role"), str):
            raise ValueError(f"{where} has neither 'from' nor 'role'.")
        return dict(turn)
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(value, str):
        raise ValueError(f"{where} has no text as its 'value'.")
    if speaker == CALL:
        return {**kept, "role": "assistant", "content": None, "tool_calls": _calls(value, where)}
    if not isinstance(speaker, str) or speaker not in ROLES:
        known = [*ROLES, CALL]
        raise ValueError(f"{where} is from {speaker!r}{did_you_mean(str(speaker), known)}: known are {', '.join(known)}.")
    return {**kept, "role": ROLES[speaker], "content": value}


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    """The calls of a turn, one object with name and arguments or a list of them."""
    found = from_json(value)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f'{where} is from {CALL!r}, and its value is no JSON of {{"name": ..., "arguments": ...}} or of a list of those.')
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]
