"""`zotune prompt --llm`: rounds of the real OptoPrime with a scripted language model, and a local model in that form."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from command_cases import Result, run_command, save_data, save_masked, save_model
from zotune import tasks
from zotune.prompting import PromptArguments, SearchResult, search
from zotune.prompting.llm import LocalLLM
from zotune.training.arguments import ModelArguments

pytest.importorskip("opto", reason="the search by feedback is trace-opt's: pip install --no-deps trace-opt; pip install black graphviz")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    save_model(folder / "my-model")
    save_masked(folder / "my-masked")
    save_data(folder)
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


class Scripted:
    """A language model that gives written replies, and keeps what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = list(replies), list[str]()

    def __call__(self, messages: Sequence[dict[str, str]], number: int = 0, **others: Any) -> SimpleNamespace:
        self.asked.append(messages[-1]["content"])
        if not self.replies:
            raise KeyboardInterrupt
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=self.replies.pop(0)))])


def suggested(**values: Any) -> str:
    return json.dumps({"reasoning": "…", "suggestion": values})


def advised(out: Path, llm: Any, lines: list[str] | None = None, **options: Any) -> SearchResult:
    sizes = {"num_search": 16, "num_dev": 8, "rounds": 10, "num_eval": 8, "use_cpu": True, "data_dir": "data"}
    args = PromptArguments(**{"task": "sst2", "output_dir": str(out), **sizes, **options})
    return search(ModelArguments("my-model"), args, (lines if lines is not None else []).append, llm=llm)


def variables(text: str) -> dict[str, str]:
    """Name of each variable in the problem, as trace-opt numbers it."""
    return {kind: re.search(rf"\b{kind}\d+", text)[0] for kind in ("instruction", "template", "label_words")}


class Answering(Scripted):
    """Replies are functions of the variables' names."""

    def __call__(self, messages: Sequence[dict[str, str]], number: int = 0, **others: Any) -> SimpleNamespace:
        if self.replies and callable(self.replies[0]):
            self.replies[0] = self.replies[0](variables(messages[-1]["content"]))
        return super().__call__(messages, number, **others)


def change(**values: Any) -> Any:
    return lambda names: suggested(**{names[kind]: value for kind, value in values.items()})


WORDS = {"negative": "bad", "positive": "good"}
GOOD = change(instruction="In short:", template="the film: {sentence} It was", label_words=WORDS)
SCRIPT = [
    GOOD,
    "no JSON at all",
    change(template=["{sentence}"], label_words="bad, good"),
    change(template="{review} It was"),
    change(template="{sentence} is", label_words={"negative": "good", "positive": "good"}),
    change(label_words={"negative": "bad"}),
    change(label_words={"negative": "terrible", "positive": "great"}, template="{sentence} This movie is"),
    "I have nothing to add: TERMINATE",
]


def test_good_malformed_and_mistyped_answers_all_become_rounds(tmp_path: Path) -> None:
    llm, lines = Answering(*SCRIPT), list[str]()
    found = advised(tmp_path / "out", llm, lines)
    asked = llm.asked
    assert "accuracy" in asked[0] and "The worst examples:" in asked[0] and "answered" in asked[0]
    assert "The best so far is" in asked[1] and "the film: {sentence} It was" in asked[1]
    assert 'no JSON object with a "suggestion"' in asked[2]
    assert "must be a text, not ['{sentence}']" in asked[3] and "must be a JSON object from class name" in asked[3]
    assert "names 'review', which is no column" in asked[4], "an unknown column is feedback"
    assert "two options are the same" in asked[5], "equal label words are feedback"
    assert "must have exactly the keys ['negative', 'positive']" in asked[6]
    assert any("no further suggestion" in line for line in lines) and len(asked) == 8
    assert found.summary["replies"] == 8 and found.summary["candidates"] >= 2
    assert tasks.load(tmp_path / "out/best.yaml").prompt == found.best.prompt
    log = [json.loads(line) for line in (tmp_path / "out/search.jsonl").read_text().splitlines()]
    prompts = [event["prompt"] for event in log if event.get("event") == "scored"]
    assert "In short:\nthe film: {sentence} It was" in prompts and None in prompts


def test_a_stopped_search_reads_its_replies_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"best\.yaml holds the best"):
        advised(tmp_path / "out", Answering(GOOD, change(template="{sentence} is")))
    assert tasks.load(tmp_path / "out/best.yaml").options
    llm = Answering("TERMINATE")
    found = advised(tmp_path / "out", llm)
    assert len(llm.asked) == 1, "two replies are on file"
    straight = advised(tmp_path / "straight", Answering(GOOD, change(template="{sentence} is"), "TERMINATE"))
    assert found.best == straight.best and found.summary["held_out"] == straight.summary["held_out"]
    assert found.summary["sequences"]["search"] == straight.summary["sequences"]["search"]


def test_a_search_that_fails_later_leaves_the_best_so_far(tmp_path: Path) -> None:
    def failing(messages: Sequence[dict[str, str]], number: int = 0, **others: Any) -> SimpleNamespace:
        if number:
            raise ValueError("the context is too short")
        words = {"negative": "great", "positive": "terrible"}  # the other way round: one of both is better
        content = suggested(template="{sentence} This movie is", label_words=words)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=content))])

    with pytest.raises(ValueError, match="the context is too short"):
        advised(tmp_path / "out", failing)
    log = [json.loads(line) for line in (tmp_path / "out/search.jsonl").read_text().splitlines()]
    first, second = (event for event in log if event.get("event") == "scored")
    better = (-second["value"], second["loss"]) < (-first["value"], first["loss"])
    assert (tmp_path / "out/best.yaml").exists() is better


def test_a_local_model_replies_by_its_seed_and_leaves_the_generator(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    model = LlamaForCausalLM.from_pretrained("my-model")
    options = {"max_new_tokens": 6, "temperature": 1.0}
    messages = [{"role": "system", "content": "the film"}, {"role": "user", "content": "is"}]
    before = torch.get_rng_state()
    texts = []
    for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0)):
        llm = LocalLLM(model, tokenizer, model.config, seed=seed, **options)
        texts.append(llm(messages=messages, number=number, response_format={}).choices[0].message.content)
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert torch.equal(before, torch.get_rng_state())
    assert llm.text(messages) == "the film\n\nis\n"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert llm.text(messages) == "<system>the film<user>is<a>"
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    assert llm.text(messages) == "the film\n\nis"


BAD: dict[str, tuple[list[str], str]] = {
    "a short context": (["--llm", "my-model"], "choose a model with a longer context"),
    "an encoder": (["--llm", "my-masked"], "is no causal language model"),
    "no such model": (["--llm", "./nothing"], "there is no model folder"),
    "templates": (["--llm", "my-model", "--templates", "my.jsonl"], "--llm proposes its own"),
    "no llm": (["--temperature", "0"], "it is an option of --llm"),
    "candidates": (["--llm", "my-model", "--task", "copa"], "no folder data/copa"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = BAD[name]
    usual = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--num_search", "4", "--num_dev", "4"]
    result: Result = run_command(capsys, "prompt", *usual, "--output_dir", str(tmp_path / "out"), *words)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1
