"""Chats: their tokens are the chat template's, and what is trained on is the assistant's, whatever the tokenizer."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from chat_tokenizers import KINDS, TINYLLAMA, chat_tokenizer
from zotune import tasks
from zotune.tasks.chat import ChatOptions, chat_of
from zotune.tasks.collators import LanguageModelCollator
from zotune.tasks.encoding import Encoder
from zotune.tasks.sources import Rows

SYSTEM = {"role": "system", "content": "a user asks"}
CHAT = [
    {"role": "user", "content": "was it  good?"},
    {"role": "assistant", "content": "it was. \U0001f600\nso"},
    {"role": "user", "content": "and the end?"},
    {"role": "assistant", "content": "less so."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def rows(*values: Any) -> Rows:
    return Rows(list(values), "mine.jsonl", range(1, len(values) + 1))


def encoded(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[list[int], list[bool]]:
    """Ids, and which are trained on by the collator's batch."""
    (example,) = Encoder(tokenizer, **options).completions(rows(row))
    ids = example["prompt_ids"] + example["completion_ids"]
    batch = LanguageModelCollator(pad_token_id=0)([example])
    trained = [False] * len(ids)
    for position, target in zip(batch["positions"][0].tolist(), batch["targets"][0].tolist(), strict=True):
        if target >= 0:
            assert ids[position + 1] == target
            trained[position + 1] = True
    return ids, trained


def stretches(tokenizer: Any, ids: list[int], trained: list[bool]) -> list[str]:
    """The texts of the stretches of tokens that are trained on."""
    runs: list[list[int]] = []
    for place, (token, chosen) in enumerate(zip(ids, trained, strict=True)):
        if chosen and place and trained[place - 1]:
            runs[-1].append(token)
        elif chosen:
            runs.append([token])
    return [tokenizer.decode(run) for run in runs]


def template_ids(tokenizer: Any, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **variables)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_chat_template(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    for chat in (CHAT, CHAT[:2], [SYSTEM, *CHAT]):
        ids, trained = encoded(tokenizer, {"messages": chat})
        assert ids == template_ids(tokenizer, chat)
        texts = [text.replace("\U0001f600", "*").replace("<unk>", "*").split() for text in stretches(tokenizer, ids, trained)]
        ends = {"llama2": "</s>", "tinyllama": "</s>", "unigram": "</s>", "metaspace-first": "</s>", "phi3": "<|end|>"}
        end = ends.get(kind, "<|im_end|>")
        bare = ["".join(text) for text in texts]
        assert bare == [f"itwas.*so{end}", f"lessso.{end}"][: len(bare)] and len(bare) == sum(m["role"] == "assistant" for m in chat)


@pytest.mark.parametrize("kind", ["llama2", "tinyllama"])
def test_pieces_would_have_marks_that_the_template_has_not(kind: str) -> None:
    """What makes these tokenizers a test: a text's pieces are not its tokens."""
    tokenizer = chat_tokenizer(kind)
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False)
    start = text.index("it was.")
    apart = [token for piece in (text[:start], text[start:]) for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    assert apart != template_ids(tokenizer, CHAT[:2])


def test_a_tokenizer_without_offsets_is_read_by_prefixes() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TINYLLAMA
    ids, trained = encoded(tokenizer, {"messages": CHAT})
    assert ids == template_ids(tokenizer, CHAT)
    assert stretches(tokenizer, ids, trained) == ["it was. \U0001f600\nso</s>", "less so.</s>"]


def test_tokens_that_cannot_be_told_apart_are_a_sentence() -> None:
    class Joining(ByT5Tokenizer):
        """Without offsets, and tokens of text that depend on what follows."""

        def __call__(self, text: str, **options: Any) -> Any:
            found = super().__call__(text, **options)
            found["input_ids"] = [len(text), *found["input_ids"]]
            return found

    class Own(ByT5Tokenizer):
        def apply_chat_template(self, *args: Any, tokenize: bool = True, **options: Any) -> Any:
            found = super().apply_chat_template(*args, tokenize=tokenize, **options)
            return {"input_ids": [5, *found["input_ids"]]} if tokenize else found

    for kind, message in ((Joining, "use the fast version of the tokenizer"), (Own, "tokenizes a chat in a way of its own")):
        tokenizer = kind()
        tokenizer.chat_template = TINYLLAMA
        with pytest.raises(ValueError, match=f"line 1: {kind.__name__} .*{message}"):
            encoded(tokenizer, {"messages": CHAT})


def test_text_that_the_tokenizer_changes_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    encoded(chat_tokenizer("unigram"), {"messages": CHAT})  # the emoji is unknown to it
    assert "mine.jsonl: 1 of 1 rows whose text the tokenizer changes, so that it was not checked" in caplog.text


# -- tools and variables of the template ----------------------------------------------------------------------------------------------


def test_tools_calls_and_variables_reach_the_template(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer("byte-level")
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "21"}, CHAT[3]]
    as_object = [chat[0], {**chat[1], "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Paris"}}}]}, *chat[2:]]
    expected = template_ids(tokenizer, as_object, tools=TOOLS, enable_thinking=False)
    for row in (
        {"messages": chat, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": as_object, "tools": json.dumps(TOOLS), "chat_template_kwargs": '{"enable_thinking": false}'},
    ):
        ids, trained = encoded(tokenizer, row)
        assert ids == expected
    first, second = stretches(tokenizer, ids, trained)
    assert json.loads(first.split("<call>")[1].split("</call>")[0]) == {"name": "weather", "arguments": {"city": "Paris"}}
    assert "less so." in second and "21" not in first + second
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": chat}))
    options = {"tools": tmp_path / "tools.json", "chat_template_kwargs": {"enable_thinking": False}}
    (example,) = tasks.prepare(tokenizer, train_file=tmp_path / "x.jsonl", **options).train
    assert example["prompt_ids"] + example["completion_ids"] == expected
    assert encoded(tokenizer, {"messages": chat, "tools": TOOLS}, chat=ChatOptions(None, {"enable_thinking": False}))[0] == expected
    assert not caplog.text


def test_arguments_stay_a_text_for_a_template_that_writes_text() -> None:
    tokenizer = chat_tokenizer("byte-level")
    kept, tokenizer.chat_template = (
        tokenizer.chat_template,
        tokenizer.chat_template.replace("call['function'] | tojson", "call['function']['arguments']"),
    )
    try:
        ids, _ = encoded(tokenizer, {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]})
        assert '<call>{"city": "Paris"}</call>' in tokenizer.decode(ids)
    finally:
        tokenizer.chat_template = kept


def test_what_the_template_does_not_read_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer("tinyllama")
    row = {"messages": [{**CHAT[0], "name": "Ann"}, CHAT[1]], "tools": TOOLS, "chat_template_kwargs": {"thinking": 1}}
    Encoder(tokenizer).completions(rows(row, row))
    assert caplog.text.count("does not read") == 3
    for what in ("the key 'name' of messages", "tools", "chat_template_kwargs 'thinking'"):
        assert f"mine.jsonl: the chat template does not read {what}, which has no effect." in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": {"a": 1}}, "tools must be a list of JSON schemas"),
        ({"tools": "not json"}, "tools must be a list of JSON schemas"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs cannot set 'tokenize'"),
        ({"functions": [{"name": "f"}]}, "has the column 'functions', which is not read: write the functions as 'tools'"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "column 'messages' must hold a list"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "write it as 'tool_calls'"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": 3}]}, "column 'messages' must hold a list"),
        ({"messages": []}, "column 'messages' must hold a list"),
    ],
)
def test_malformed_tools_and_messages_are_a_sentence(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(chat_tokenizer("byte-level"), {"messages": CHAT, **row})


def test_options_of_chats_are_refused_where_there_is_none(tmp_path: Any) -> None:
    tokenizer = chat_tokenizer("byte-level")
    (tmp_path / "x.jsonl").write_text('{"text": "a film"}')
    with pytest.raises(ValueError, match=r"x.jsonl has none: leave them out"):
        tasks.prepare(tokenizer, train_file=tmp_path / "x.jsonl", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="a task has prompts"):
        tasks.prepare(tokenizer, task="sst2", chat_template_kwargs={"enable_thinking": False})
    (tmp_path / "tools.json").write_text("{")
    with pytest.raises(ValueError, match=r"tools\.json: "):
        tasks.prepare(tokenizer, train_file=tmp_path / "x.jsonl", tools=tmp_path / "tools.json")


# -- which messages are trained on ----------------------------------------------------------------------------------------------------


def marked(*marks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{**message, **mark} for message, mark in zip(CHAT, marks, strict=True)]}


@pytest.mark.parametrize("kind", ["llama2", "phi3", "byte-level", "generation"])
def test_weights_and_marks_of_messages_are_honored(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    none: dict[str, Any] = {}

    def texts(*marks: dict[str, Any]) -> list[str]:
        ids, trained = encoded(tokenizer, marked(*marks))
        assert ids == template_ids(tokenizer, CHAT)  # the template does not see the marks
        return [bare for text in stretches(tokenizer, ids, trained) if (bare := "".join(text.split()))]

    first, second = texts(none, none, none, none)
    for name in ("weight", "train", "training"):
        assert texts(none, {name: 0}, none, {name: 1}) == [second]
        assert texts(none, none, none, {name: False}) == [first]
    assert texts({"train": True}, {"train": False}, none, none) == ["wasitgood?", second]
    detail = [{"begin_offset": 3, "end_offset": 6, "train": True}]
    assert texts(none, {"train": False, "train_detail": detail}, none, none) == ["was.", second]
    less = [{"begin_offset": 0, "end_offset": 4, "train": False}]
    assert texts(none, none, none, {"train_detail": less}) == [first, second.removeprefix("less")]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"weight": 0.5}, r"message 2 \(assistant\) has 'weight' 0.5: only 0"),
        ({"train": "no"}, r"message 2 \(assistant\) has 'train' 'no'"),
        ({"weight": 0, "train": True}, "'weight' and 'train' contradict each other"),
        ({"train_detail": [{"begin_offset": 5, "end_offset": 99, "train": True}]}, '\'?"train_detail" is a list'),
        ({"train_detail": 3}, '"train_detail" is a list'),
    ],
)
def test_a_mark_that_says_nothing_is_refused(mark: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_of(marked({}, mark, {}, {}))


def test_a_weight_of_a_question_or_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r'message 1 \(user\) has the weight 1, .* write "train": true'):
        chat_of(marked({"weight": 1}, {}, {}, {}))
    with pytest.raises(ValueError, match="every message of the assistant has the weight 0"):
        chat_of(marked({}, {"weight": 0}, {}, {"weight": 0}))


def test_messages_that_the_template_rewrites_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer("tinyllama")
    kept, tokenizer.chat_template = (
        tokenizer.chat_template,
        tokenizer.chat_template.replace("m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else 'x') +"),
    )
    try:
        ids, trained = encoded(tokenizer, {"messages": CHAT})
        assert [text.strip() for text in stretches(tokenizer, ids, trained)] == ["less so.</s>"]
        assert "1 of 1 rows with earlier messages of the assistant that the chat template rewrites" in caplog.text
    finally:
        tokenizer.chat_template = kept


# -- cutting --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama2", "phi3", "tinyllama"])
def test_truncation_drops_the_oldest_turns_and_keeps_the_system(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer(kind)
    chat = [SYSTEM, *CHAT, *CHAT]
    whole, middle, least = (len(template_ids(tokenizer, [SYSTEM, *chat[start:]])) for start in (1, 3, 7))
    for limit, start in ((whole - 2, 3), (middle - 1, 3), (least - 1, 7)):
        ids, _ = encoded(tokenizer, {"messages": chat}, limit=limit, truncate=True)
        assert ids == template_ids(tokenizer, [SYSTEM, *chat[start:]])
    assert encoded(tokenizer, {"messages": chat}, limit=whole - 1, truncate=True)[0] == template_ids(tokenizer, chat)
    assert caplog.text.count("1 of 1 rows are cut to the length limit (--truncate).") == 3


@pytest.mark.parametrize("kind", ["llama2", "phi3", "byte-level"])
def test_a_long_question_is_cut_at_its_beginning(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    chat = [SYSTEM, {"role": "user", "content": "so good " * 40 + "?"}, CHAT[3]]
    whole = template_ids(tokenizer, chat)
    ids, trained = encoded(tokenizer, {"messages": chat}, limit=59, truncate=True)
    assert len(ids) == 60 and stretches(tokenizer, ids, trained) == stretches(tokenizer, *encoded(tokenizer, {"messages": chat}))
    assert ids[:8] == whole[:8] and ids[-20:] == whole[-20:]
    assert "a user asks" in tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"the last turn has, without what can be cut of its questions, \d+ tokens, more than the model's"):
        encoded(tokenizer, {"messages": [SYSTEM, CHAT[0], {"role": "assistant", "content": "so good " * 40}]}, limit=59, truncate=True)


def test_every_kind_of_row_reports_what_was_cut(tiny_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_lm), limit=20, truncate=True)
    long = "a long film " * 20
    with caplog.at_level(logging.WARNING):
        encoder.completions(rows({"text": long}, {"text": "short"}))
        encoder.completions(rows({"prompt": long, "completion": " x"}))
        encoder.choices(rows({"sentence": long, "label": 0}), tasks.load("sst2"))
        encoder.classifier(rows({"sentence": long, "label": 0}), tasks.load("sst2"))
    assert caplog.text.count("mine.jsonl: 1 of 2 rows are cut") == 1 and caplog.text.count("mine.jsonl: 1 of 1 rows are cut") == 3
