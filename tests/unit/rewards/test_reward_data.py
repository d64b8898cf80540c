"""Prompts for rewards: rows as for TRL's GRPO, chats, tasks, batches, the ends of completions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from transformers import AutoConfig, AutoTokenizer

from chat_tokenizers import KINDS, chat_tokenizer
from zotune import tasks
from zotune.rewards.data import PromptData, RewardCollator, end_of_text

ASKED = {"role": "user", "content": "was it good ?"}
CHATS = [
    {"prompt": [ASKED], "answer": "so", "completion": "not handed on"},
    {"prompt": [ASKED, {"role": "assistant", "content": "so"}, {"role": "user", "content": "the film"}], "other": 1},
]


def of_file(tokenizer: Any, folder: Path, rows: list[dict], **options: Any) -> tasks.PreparedData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_completion_length": 5, **options}
    return tasks.prepare(tokenizer, None, train_file=path, objective="reward", parts=("train",), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_its_template_with_the_generation_prompt(kind: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(kind)
    data = of_file(tokenizer, tmp_path, CHATS)
    for example, row in zip(data.train, CHATS, strict=True):
        template = tokenizer.apply_chat_template(row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=True)
        assert example["prompt_ids"] == list(template["input_ids"]) and example["prompt"] == row["prompt"]
    assert [example["columns"] for example in data.train] == [{"answer": "so", "other": None}, {"answer": None, "other": 1}]
    assert data.chats and data.main_metric == "reward"
    turn_end = {"phi3": "<|end|>"}.get(kind)
    expected = [tokenizer.eos_token_id] + ([] if turn_end is None else [tokenizer.convert_tokens_to_ids(turn_end)])
    assert list(data.collate_eval.stops) == expected


def test_a_task_gives_its_prompt_and_its_right_answers(tiny_lm: Path, data_dir: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(tiny_lm), AutoConfig.from_pretrained(tiny_lm)
    options = {"data_dir": data_dir, "num_train": 3, "num_eval": 2, "max_completion_length": 8}
    for name in ("sst2", "squad"):
        task = tasks.load(name)
        data = tasks.prepare(tokenizer, config, task=task, objective="reward", truncate=True, **options)
        assert [example["number"] for example in data.train] == [0, 1, 2] and len(data.eval) == 2
        for example in data.train:
            columns = example["columns"]
            assert columns["reference"] == list(task.references(columns)) and example["prompt"] == task.render(columns)[0]
        assert data.collate_eval.stops == (tokenizer("a\n")["input_ids"][-1], tokenizer.eos_token_id)
        assert data.train_objective == data.eval_objective == "reward"


def test_a_batch_is_padded_on_the_left() -> None:
    tokenizer = chat_tokenizer("llama2")
    data = PromptData(tokenizer, SimpleNamespace(config=None), 4)
    rows = datasets.Dataset.from_list([{"prompt": "the film", "n": 1}, {"prompt": "the film was good and", "n": 2}])
    examples = data.encoded(rows, "train_dataset")
    batch = RewardCollator(9, pad_to_multiple_of=4)(examples)
    short, long = (list(tokenizer(row["prompt"])["input_ids"]) for row in rows)
    width = -(-len(long) // 4) * 4
    assert batch["prompt_ids"].tolist() == [[9] * (width - len(ids)) + ids for ids in (short, long)]
    assert batch["prompt_mask"].sum(dim=1).tolist() == [len(short), len(long)] and batch["prompt_mask"][0, 0] == 0
    assert batch["prompt_number"].tolist() == [0, 1]
    assert batch["rows"] == [{"prompt": row["prompt"], "columns": {"n": row["n"]}} for row in rows]
    assert data.stops == data.collator.stops == (tokenizer.eos_token_id,)
    assert data.encoded(examples, "train_dataset") is examples


def test_the_generation_settings_say_where_a_text_ends() -> None:
    config = SimpleNamespace(eos_token_id=3)
    assert end_of_text(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[1, 2]), config=config)) == (1, 2)
    assert end_of_text(SimpleNamespace(config=config)) == (3,) and end_of_text(SimpleNamespace()) == ()


LONG = [{"prompt": "the film was good and the end"}]
REFUSED: dict[str, tuple[list[dict], dict[str, Any], str]] = {
    "empty": ([{"prompt": "a"}, {"prompt": "  "}], {}, "line 2: the prompt is empty"),
    "no prompt": ([{"prompt": "a"}, {"text": "a"}], {}, "no column 'prompt'.* pass --task"),
    "messages": ([{"messages": [ASKED]}], {}, "write the messages as 'prompt'"),
    "mixed": ([{"prompt": "a"}, CHATS[0]], {}, "line 2: .*messages in some rows and texts in others"),
    "no text": ([{"prompt": 5}], {}, "must hold a text, or a list of"),
    "answered": ([{"prompt": [*CHATS[1]["prompt"][:2]]}], {}, "last message of the prompt is the assistant's"),
    "too long": (LONG, {"max_length": 8}, "the prompt has 7 tokens and its longest completion .max_completion_length. 5"),
    "no space": (LONG, {"max_length": 4, "truncate": True}, "max_completion_length. has 5 tokens"),
    "no template": ([{"prompt": [ASKED]}], {"template": True}, "chat template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_prompt_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, options, message = REFUSED[name]
    tokenizer = chat_tokenizer("byte-level")
    if options == {"template": True}:
        monkeypatch.setattr(tokenizer, "chat_template", None)
        options = {}
    with pytest.raises(ValueError, match=message) as caught:
        of_file(tokenizer, tmp_path, rows, **options)
    assert "\n" not in str(caught.value)


def test_a_long_prompt_loses_its_beginning_with_truncate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer("byte-level")
    data = of_file(tokenizer, tmp_path, LONG, max_length=8, truncate=True)
    whole = tokenizer(LONG[0]["prompt"])["input_ids"]
    assert data.train[0]["prompt_ids"] == list(whole[-4:]) and data.train[0]["prompt"] == LONG[0]["prompt"]
    assert "1 of 1 rows are cut" in caplog.text or "1 of 1 rows was cut" in caplog.text
