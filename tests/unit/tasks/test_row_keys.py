"""Every key of a data row acts, is refused, or is documented as ignored; an unknown one is named once."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from chat_tokenizers import chat_tokenizer
from docs_pages import DOCS
from zotune import tasks
from zotune.tasks.chat import MARKS
from zotune.tasks.columns import FORMATS, IGNORED, REFUSED, USED
from zotune.tasks.encoding import Encoder
from zotune.tasks.sources import Rows

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
BASE: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "was it good?"}, {"role": "assistant", "content": "it was."}]},
    "conversations": {"conversations": [{"from": "human", "value": "was it good?"}, {"from": "gpt", "value": "it was."}]},
    "prompt": {"prompt": "the film was", "completion": " good"},
    "instruction": {"instruction": "was the film good", "output": "it was."},
    "text": {"text": "the film was good"},
}
#: form -> key -> what becomes of it, and a value that would change the example.
KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "messages": {
        "messages": ("acts", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "tools": ("acts", [{"type": "function", "function": {"name": "f"}}]),
        "chat_template_kwargs": ("acts", {"enable_thinking": False}),
        "parallel_tool_calls": ("ignored", False),
        "id": ("ignored", 7),
        "functions": ("refused", [{"name": "f"}]),
        "function_call": ("refused", "auto"),
    },
    "conversations": {
        "conversations": ("acts", [{"from": "human", "value": "was it dull?"}, {"from": "gpt", "value": "it was not."}]),
        "system": ("acts", "be brief"),
        "tools": ("acts", [{"type": "function", "function": {"name": "clock"}}]),
        "chat_template_kwargs": ("acts", {"enable_thinking": False}),
        "id": ("ignored", 7),
    },
    "prompt": {"prompt": ("acts", "the end was"), "completion": ("acts", " dull"), "id": ("ignored", 7)},
    "instruction": {
        "instruction": ("acts", "was it dull"),
        "input": ("acts", "the film was good"),
        "output": ("acts", "it was not."),
        "system": ("acts", "be brief"),
        "id": ("ignored", 7),
        "history": ("refused", [["a", "b"]]),
    },
    "text": {"text": ("acts", "the plot is dull"), "id": ("ignored", 7)},
}
#: key of the assistant's message -> a value that changes the example.
MESSAGE_KEYS: dict[str, Any] = {
    "role": "user",
    "content": "less so",
    "tool_calls": [CALL],
    "weight": 0,
    "train": False,
    "training": 0,
    "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}],
}


def examples(row: dict[str, Any]) -> list[dict[str, Any]]:
    return Encoder(chat_tokenizer("byte-level")).completions(Rows([row, row], "mine.jsonl", [1, 2]))


def test_the_table_has_every_key() -> None:
    assert {form: set(keys) for form, keys in KEYS.items()} == {form: {*USED[form], *IGNORED[form], *REFUSED[form]} for form in USED}
    assert set(MARKS) <= set(MESSAGE_KEYS)
    page = (DOCS / "reference/tasks.md").read_text()
    for keys in (*KEYS.values(), MESSAGE_KEYS):
        assert all(f"`{key}`" in page for key in keys if key not in ("prompt", "completion", "text", "role"))


@pytest.mark.parametrize(("form", "key"), [(form, key) for form, keys in KEYS.items() for key in keys])
def test_a_key_does_what_the_table_says(form: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    what, value = KEYS[form][key]
    row = {**BASE[form], key: value}
    if what == "refused":
        with pytest.raises(ValueError, match=f"the column '{key}', .*: write"):
            examples(row)
        return
    assert (examples(row) != examples(BASE[form])) == (what == "acts")
    assert not caplog.text


@pytest.mark.parametrize("key", MESSAGE_KEYS)
def test_a_key_of_a_message_acts(key: str) -> None:
    user, answer = BASE["messages"]["messages"]
    chat = [user, answer, user, {**answer, key: MESSAGE_KEYS[key]}]
    plain = [user, answer, user, answer]
    assert examples({"messages": chat}) != examples({"messages": plain})


@pytest.mark.parametrize("form", KEYS)
def test_an_unknown_key_is_named_once(form: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert examples({**BASE[form], "loss_weight": 3, "source": "a"}) == examples(BASE[form])
    (record,) = caplog.records
    used = " and ".join(next(columns for columns in FORMATS if columns[0] == form))
    assert record.getMessage() == f"mine.jsonl: used are the columns {used}; not used: 'loss_weight', 'source'."


def test_two_forms_in_a_row_name_the_one_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert examples({**BASE["text"], **BASE["prompt"]}) == examples(BASE["prompt"])
    assert "not used: 'text'" in caplog.text


def test_further_columns_of_a_tasks_rows_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    encoder, task = Encoder(chat_tokenizer("byte-level")), tasks.load("sst2")
    plain, more = ({"sentence": "a joy", "label": 1, **extra} for extra in ({}, {"idx": 4, "weight": 0}))
    first, second = (encoder.choices(Rows([row], "mine.jsonl", [1]), task) for row in (plain, more))
    assert first == second and not caplog.text
