"""`zotune prompt` without a language model's advice: label words, halving, the task file, resuming, bad requests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_cases import Result, run_command, save_data, save_masked, save_model
from zotune import tasks
from zotune.prompting import PromptArguments, search
from zotune.prompting.candidate import Candidate, as_task
from zotune.prompting.scoring import Scores, fit_words
from zotune.prompting.search_log import SearchLog
from zotune.prompting.workplace import workplace
from zotune.tasks.task import MASK
from zotune.training.arguments import ModelArguments

Command = Callable[..., Result]
SMALL = {"data_dir": "data", "num_search": 16, "num_dev": 8, "rounds": 2, "keep": 2, "use_cpu": True}
SPACE = """
templates: ["{sentence} It was", "In short: {sentence}", "{sentence} This movie is"]
words: {0: [bad, terrible, dull], positive: [good, great]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompt")
    save_model(folder / "my-model")
    save_model(folder / "second")
    save_masked(folder / "my-masked")
    save_data(folder)
    rows = (folder / "data/sst2/train.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("is", "was"))
    (folder / "other/sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"other/sst2/{split}.jsonl").write_text(rows.replace("is", "was"))
    (folder / "space.yaml").write_text(SPACE)
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: run_command(capsys, *words)


def arguments(out: Path, **options: Any) -> PromptArguments:
    return PromptArguments(**{"task": "sst2", "output_dir": str(out), "templates": "space.yaml", **SMALL, **options})


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()][1:]


def test_fitted_words_are_the_best_of_all_sets() -> None:
    drawn = np.random.default_rng(3)
    answers = drawn.integers(3, size=200)
    good = {0: 1, 1: 3, 2: 6}
    table = drawn.normal(size=(200, 8)) + 2 * (np.arange(8)[None] == np.vectorize(good.get)(answers)[:, None])
    scores, groups = Scores(table, answers), [[0, 1, 2], [2, 3, 4], [5, 6, 7]]
    best = min((set_ for set_ in itertools.product(*groups) if len(set(set_)) == 3), key=lambda set_: scores.chosen(set_).loss)
    assert fit_words(scores, groups) == best == (1, 3, 6)
    assert fit_words(scores, [[2], [2], [5]]) is None, "two classes share their only word"
    assert fit_words(scores, [[0, 1], [0], [5]])[1] == 0, "the second class has no other word"


def test_one_forward_with_all_words_scores_each_set(tmp_path: Path) -> None:
    there = workplace(ModelArguments("my-model"), arguments(tmp_path / "out"), str(tmp_path))
    words = (" bad", " terrible", " good", " great", " the film")
    task = replace(there.task, prompt="{sentence} It was")
    together = there.scorer.score(task, there.search, words)
    for set_ in ((0, 3), (1, 2), (4, 3)):
        alone = there.scores(Candidate(task.prompt, tuple(words[column] for column in set_)), there.search)
        np.testing.assert_allclose(together.chosen(set_).options, alone.options, atol=1e-5)
        assert together.chosen(set_).value == alone.value
    assert there.scorer.sequences == 4 * 16


def test_each_round_scores_only_rows_it_has_not_seen(tmp_path: Path) -> None:
    found = search(ModelArguments("my-model"), arguments(tmp_path / "out")).summary
    assert found["candidates"] == 3 * 3 * 2 and found["templates"] == 3
    assert found["sequences"]["search"] == 3 * 8 + 2 * 8, "three templates on 8 rows, two of them on 8 more"
    assert [event["rows"] for event in events(tmp_path / "out") if event["event"] == "round"] == [8, 16]


def test_the_found_file_evaluates_and_trains(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    words = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data"]
    sizes = ["--num_search", "16", "--num_dev", "16", "--rounds", "2", "--keep", "2"]
    done = command("prompt", *words, "--output_dir", str(out), "--templates", "space.yaml", *sizes)
    assert done.code == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    assert "sequences" in done.out and summary["held_out"]["after"] >= summary["held_out"]["before"]
    words[3] = str(out / "best.yaml")
    assert command("eval", *words, "--output_file", str(tmp_path / "r.json")).code == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["prompt"] == summary["prompt"] and result["metrics"]["accuracy"] == summary["evaluation"]["after"]
    assert command("train", *words, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--learning_rate", "1e-4").code == 0
    assert command("eval", *words, "--template", "mezo").code == 0, "the task's own templates are still there"


def test_a_stopped_search_goes_on_to_the_same_result(tmp_path: Path) -> None:
    search(ModelArguments("my-model"), arguments(tmp_path / "straight"))
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("round 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"best\.yaml holds the best"):
        search(ModelArguments("my-model"), arguments(tmp_path / "cut"), stop)
    first = events(tmp_path / "cut")[0]["kept"][0]
    assert tasks.load(tmp_path / "cut/best.yaml").prompt == first["prompt"]
    with (tmp_path / "cut/search.jsonl").open("a") as file:
        file.write('{"event": "rou')  # a crash cut the line
    search(ModelArguments("my-model"), arguments(tmp_path / "cut"), lines.append)
    assert not any(line.startswith("round 1") for line in lines[2:]), "the first round is read"
    straight, cut = ([{**event, "sequences": 0} for event in events(tmp_path / name)] for name in ("straight", "cut"))
    for one, other in zip(straight, cut, strict=True):
        one, other = ({**each, "kept": [{**k, "loss": round(k["loss"], 4)} for k in each.get("kept", [])]} for each in (one, other))
        assert {**one, "loss": 0} == {**other, "loss": 0}
    with pytest.raises(ValueError, match="another seed"):
        search(ModelArguments("my-model"), arguments(tmp_path / "cut", seed=1))


@pytest.mark.parametrize("line", ['{"event": "round", "kept": []}', '{"event": "other"}', '{"event": "reply", "reply": 1}', "[]"])
def test_a_damaged_log_is_one_sentence(line: str, tmp_path: Path) -> None:
    log = SearchLog(tmp_path, {"seed": 1})
    log.add({"event": "reply", "reply": "a"})
    assert SearchLog(tmp_path, {"seed": 1}).events == [{"event": "reply", "reply": "a"}]
    with log.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"search\.jsonl"):
        SearchLog(tmp_path, {"seed": 1})
    log.path.write_text("cut in the first li")
    assert SearchLog(tmp_path, {"seed": 1}).events == []


def test_a_masked_model_gets_a_prompt_with_a_mask(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    found = search(ModelArguments("my-masked"), arguments(out, templates=None, num_search=4, rounds=1, num_dev=4))
    assert found.best.prompt.count(MASK) == 1 and found.summary["templates"] > 20
    words = ["eval", "--model_name_or_path", "my-masked", "--task", str(out / "best.yaml"), "--data_dir", "data", "--objective", "mlm"]
    assert command(*words, "--output_file", str(tmp_path / "r.json")).code == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["prompt"] == found.best.prompt and result["metrics"]["accuracy"] == found.summary["evaluation"]["after"]


OPTIONS: dict[str, Any] = {
    "data_dir": "other", "train_file": "rows.jsonl", "eval_file": "rows.jsonl", "templates": None, "rounds": 1, "keep": 1,
    "num_search": 8, "num_dev": 4, "num_eval": 5, "max_length": 6, "seed": 7, "per_device_eval_batch_size": 4,
}  # fmt: skip


def test_options_of_the_search_act(tmp_path: Path) -> None:
    """Each changes the rows that are read, how they are encoded, or what is searched."""

    def look(**options: Any) -> str:
        args = arguments(tmp_path / "out", **options)
        there = workplace(ModelArguments("my-model"), args, str(tmp_path))
        try:
            tokens: Any = there.scorer.encoder.choices(there.search, there.task)
        except ValueError as error:
            tokens = str(error)
        parts = [list(rows) for rows in (there.search, there.held_out, there.evaluation or [])]
        return str((tokens, parts, there.scorer.trainer.args.per_device_eval_batch_size, args.rounds, args.keep, args.templates))

    usual = look()
    for name, value in OPTIONS.items():
        assert look(**{name: value}) != usual, name
    assert look(max_length=6) != look(max_length=6, truncate=True)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown task": ("", {"task": "sst"}, "unknown task 'sst'"),
    "task without options": ("", {"task": "squad"}, "has no options"),
    "unknown column": ('templates: ["{text} It was"]', {}, "names 'text', which is no column"),
    "the label": ('templates: ["{label} {sentence}"]', {}, "names 'label', which is no column"),
    "no column": ('templates: ["It was"]', {}, "names no column"),
    "a mask": ('templates: ["{sentence} <mask>"]', {}, "no masked language model"),
    "malformed": ('templates: ["{sentence"]', {}, "lone '{'"),
    "no label words": ("words: {0: [], 1: [good]}", {}, "'negative' has no label words"),
    "one class": ("words: {0: [bad]}", {}, "'positive' has no label words"),
    "a text for words": ("words: {0: bad, 1: [good]}", {}, "must be a list of texts"),
    "the same words": ("words: {0: [good], 1: [good]}", {}, "cannot have different label words"),
    "unknown class": ("words: {0: [bad], 1: [good], 2: [fine]}", {}, "words names 2"),
    "unknown key": ("template: [a]", {}, "did you mean 'templates'"),
    "no mapping": ("- a", {}, "expected a mapping"),
    "too many rows": ("", {"num_dev": 48}, "leaves nothing to train on"),
    "no rounds": ("", {"rounds": 0}, "--rounds 0 must be 1 or more"),
    "no folder": ("", {"output_dir": None}, "needs --output_dir"),
    "no such file": ("", {"templates": "nothing.yaml"}, "there is no file 'nothing.yaml'"),
    "foreign folder": ("", {"output_dir": "data"}, "none of them is the log of a search"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_one_sentence(name: str, tmp_path: Path) -> None:
    text, options, said = BAD[name]
    if text:
        (tmp_path / "bad.yaml").write_text(text)
        options = {"templates": str(tmp_path / "bad.yaml"), **options}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        search(ModelArguments("my-model"), arguments(tmp_path / "out", **options))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_candidate_is_checked_as_a_task_is() -> None:
    task = tasks.load("sst2")
    with pytest.raises(ValueError, match="two options are the same"):
        as_task("sst2", task, Candidate("{sentence} It was", (" good", " good")), masked=False)
    with pytest.raises(ValueError, match="starts without a blank"):
        as_task("sst2", task, Candidate("{sentence} It was", ("good", "bad")), masked=False)
