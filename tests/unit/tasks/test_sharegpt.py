"""Chats in ShareGPT's form: the same tokens and the same scored tokens as the messages that they stand for."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from chat_tokenizers import chat_tokenizer
from zotune.tasks.encoding import Encoder
from zotune.tasks.sharegpt import messages_of
from zotune.tasks.sources import Rows

TURNS = [{"from": "human", "value": "was it good?"}, {"from": "gpt", "value": "it was."}]
MESSAGES = [{"role": "user", "content": "was it good?"}, {"role": "assistant", "content": "it was."}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def example(row: dict[str, Any]) -> dict[str, Any]:
    (found,) = Encoder(chat_tokenizer("generation")).completions(Rows([row], "mine.jsonl", [1]))
    return found


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"conversations": TURNS}, {"messages": MESSAGES}),
        ({"conversations": json.dumps(TURNS)}, {"messages": MESSAGES}),
        ({"conversations": TURNS, "system": "be brief"}, {"messages": [{"role": "system", "content": "be brief"}, *MESSAGES]}),
        ({"conversations": TURNS, "system": ""}, {"messages": MESSAGES}),
        ({"conversations": MESSAGES}, {"messages": MESSAGES}),
        ({"conversations": [*TURNS, *TURNS], "tools": ""}, {"messages": [*MESSAGES, *MESSAGES]}),
        (
            {"conversations": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]},
            {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES]},
        ),
    ],
)
def test_same_as_messages(row: dict[str, Any], same: dict[str, Any]) -> None:
    assert example(row) == example(same)


def test_calls_and_observations() -> None:
    turns = [TURNS[0], {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "21"}, TURNS[1]]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    assert messages_of({"conversations": turns}) == [MESSAGES[0], call, {"role": "tool", "content": "21"}, MESSAGES[1]]
    both = [{"from": "function_call", "value": json.dumps([CALL, {"name": "clock"}])}]
    (several,) = messages_of({"conversations": both})
    assert [each["function"] for each in several["tool_calls"]] == [CALL, {"name": "clock", "arguments": {}}]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"conversations": "none"}, "must hold a list"),
        ({"conversations": []}, "must hold a list"),
        ({"conversations": [{"from": "humn", "value": "a"}]}, "turn 1 is from 'humn'.*human"),
        ({"conversations": [TURNS[0], {"from": "gpt"}]}, "turn 2 has no text as its 'value'"),
        ({"conversations": [{"text": "a"}]}, "turn 1 has neither 'from' nor 'role'"),
        ({"conversations": [{"from": "function_call", "value": "weather"}]}, "turn 1 is from 'function_call'.*no JSON"),
        ({"conversations": [{"from": "system", "value": "a"}, *TURNS], "system": "b"}, "are both there"),
        ({"conversations": TURNS, "system": 3}, "holds int, not a string"),
        ({"conversations": TURNS[:1]}, "no message has the role 'assistant'"),
    ],
)
def test_malformed(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"mine.jsonl, line 1: .*{sentence}"):
        example(row)


def test_columns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        example({"conversations": TURNS, "id": "1", "tools": json.dumps(TOOLS)})
        assert "not used" not in caplog.text
        example({"conversations": TURNS, "source": "web"})
    assert "not used: 'source'" in caplog.text
