"""Rewards on the command line: runs, their completions, evaluations and resumption, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_cases import Result, run_command, save_data, save_model, weights_digest
from trainer_cases import StopAt
from zotune.training import run_config
from zotune.training.observer import RunObserver
from zotune.training.run import run

WORDS = ["--model_name_or_path", "my-model", "--train_file", "prompts.jsonl", "--eval_file", "prompts.jsonl", "--num_eval", "6"]
WORDS += ["--max_completion_length", "4", "--per_device_train_batch_size", "4", "--learning_rate", "0.01", "--eps", "0.01"]
REWARDS = ["--reward", "contains:film", "--reward", "length:3", "--reward_weights", "1", "0.5"]
GUARD = ["--guard_task", "sst2", "--data_dir", "data"]
OWN = "def nice(prompts, completions, label, **columns):\n    return [len(text) / 100 for text in completions]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    save_model(folder / "my-model")
    save_data(folder)
    rows = [json.loads(line) for line in (folder / "data/sst2/train.jsonl").read_text().splitlines()]
    prompts = [{"prompt": row["sentence"], "label": row["label"]} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "mine.py").write_text(OWN)
    (folder / "code.yaml").write_text("reward: mine.py:nice\n")
    (folder / "named.yaml").write_text("reward: ['contains:film', 'length:3']\n")
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *words: run_command(capsys, *words)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_a_run_by_rewards_is_logged_and_evaluated(tmp_path: Path, command: Callable[..., Result]) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, *REWARDS, *GUARD, "--max_steps", "4", "--eval_steps", "2", "--logging_steps", "1", "--report_to", "tensorboard"]
    result = command("train", *words, "--output_dir", str(folder))
    assert result.code == 0, result.err
    summary = json.loads((folder / "summary.json").read_text())
    metrics = {"loss", "reward", "reward_contains:film", "reward_length:3", "completion_length", "guard_loss", "guard_accuracy"}
    assert set(summary["before"]) == set(summary["after"]) == metrics and summary["metric"] == "reward"
    assert summary["method"] == run_config.REWARD_DEFAULTS["method"]
    entries = json.loads((folder / "history.json").read_text())["entries"]
    steps = [entry for entry in entries if "learning_rate" in entry]
    assert len(steps) == 4 and all({"reward_std", "completion_length", "identical_completions"} <= entry.keys() for entry in steps)
    assert all(entry["reward"] == -entry["loss"] for entry in steps)
    assert [entry["step"] for entry in entries if "guard_accuracy" in entry] == [2, 4]
    found = lines(folder)
    assert [(line["step"], line["number"]) for line in found] == [(step, number) for step in (0, 2, 4) for number in range(4)]
    for line in found:
        text, rewards = line["completion"], line["rewards"]
        assert rewards["reward_contains:film"] == ("film" in text) and 1 <= line["length"] <= 4
        assert rewards["reward"] == rewards["reward_contains:film"] + 0.5 * rewards["reward_length:3"]
    assert result.out.count("completions at step") == 3 and "guard accuracy" in result.out and "training reward" in result.out
    assert b"completions" in b"".join(path.read_bytes() for path in folder.rglob("events.out.*"))
    assert (folder / "curve.png").stat().st_size > 1000
    again = command("eval", "--model_name_or_path", str(folder), "--output_file", "-")
    assert again.code == 0, again.err
    assert json.loads(again.out)["metrics"] == {k: pytest.approx(v) for k, v in summary["after"].items() if not k.startswith("guard_")}
    assert [line["completion"] for line in json.loads(again.out)["completions"]] == [line["completion"] for line in found[-4:]]


def test_a_stopped_run_by_rewards_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    sampled = ["--temperature", "1", "--num_generations", "2", "--max_steps", "6", "--eval_steps", "2", "--save_steps", "2"]
    words = [*WORDS, *REWARDS, *sampled, "--logging_steps", "1"]

    class Stop(RunObserver):
        def callbacks(self, metric: str, first: float | None) -> Any:
            return (StopAt(5),)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(run_config.parse([*words, "--output_dir", str(whole)]))
    with pytest.raises(KeyboardInterrupt):
        run(run_config.parse([*words, "--output_dir", str(broken)]), Stop())
    shutil.rmtree(broken / "checkpoint-4")
    with (broken / "completions.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')
    run(run_config.parse([*words, "--output_dir", str(broken), "--resume_from_checkpoint"]))
    assert weights_digest(broken) == weights_digest(whole) and lines(broken) == lines(whole)
    assert (broken / "journal.zo").read_bytes() == (whole / "journal.zo").read_bytes()


def test_a_function_of_a_file_is_named_on_the_command_line_only(tmp_path: Path, command: Callable[..., Result]) -> None:
    folder = str(tmp_path / "run")
    words = ["train", *WORDS, "--max_steps", "1", "--output_dir", folder]
    refused = command(*words, "--config", "code.yaml")
    assert refused.code == 2 and "'mine.py:nice' is code, which only the command line can name" in refused.err
    assert command(*words, "--reward", "mine.py:nice").code == 0
    refused = command("eval", "--model_name_or_path", folder)
    assert refused.code == 2 and "'mine.py:nice' is code, which only the command line can name" in refused.err
    evaluated = command("eval", "--model_name_or_path", folder, "--reward", "mine.py:nice", "--output_file", "-")
    assert evaluated.code == 0 and json.loads(evaluated.out)["metrics"]["completion_length"] <= 4
    assert run_config.parse([*WORDS, "--config", "named.yaml", "--output_dir", folder]).data.reward == ["contains:film", "length:3"]


def test_an_accuracy_is_a_reward_without_generation(tmp_path: Path, command: Callable[..., Result]) -> None:
    folder = tmp_path / "run"
    words = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--output_dir", str(folder)]
    words += ["--learning_rate", "0.01", "--eps", "0.01", "--max_steps", "2", "--logging_steps", "1", "--num_eval", "4"]
    assert command(*words, "--reward", "accuracy", "--guard_file", "my.jsonl").code == 0
    losses = [entry["loss"] for entry in json.loads((folder / "history.json").read_text())["entries"] if "loss" in entry]
    assert all(32 * loss == int(32 * loss) for loss in losses)  # 16 examples at two points
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "accuracy" and summary["before"]["guard_loss"] > 0 < summary["after"]["guard_loss"]
    assert not (folder / "completions.jsonl").exists()


def test_a_tasks_answers_bound_the_completions() -> None:
    words = ["--model_name_or_path", "my-model", "--output_dir", "run", "--reward", "exact_match", "--task"]
    assert run_config.parse([*words, "squad"]).training.max_completion_length == 50
    assert run_config.parse([*words, "sst2"]).training.max_completion_length == 16
    assert run_config.parse([*words, "sst2", "--max_completion_length", "3"]).training.max_completion_length == 3


REFUSED = {
    "--temperature 1": "--temperature would have no effect: it is an option of generated completions",
    "--reward accuracy contains:x": "--reward accuracy scores a task's options without generating",
    "--reward contains:x --objective lm": "--objective lm is a loss, and --reward stands in its place",
    "--reward contains:x --top_k 4": "top_k=4 cannot be used: completions are greedy",
    "--reward contains:x --num_generations 4": "num_generations=4 cannot be used: completions are greedy",
    "--reward contains:x --top_p 2 --temperature 1": "top_p must be in (0, 1], got 2.0",
    "--reward contains:x --temperature inf": "temperature must be a finite number",
    "--reward contains:x --reward_weights nan": "reward_weights must be finite numbers",
    "--reward contains:x --reward_weights 0": "reward_weights are all 0",
    "--reward contains:x --kv_cache_memory much": "kv_cache_memory: 'much' is no amount of memory",
    "--reward contains:x --max_completion_length 0": "max_completion_length must be at least 1",
    "--reward contains:x --log_completions false --num_completions_to_print 2": "num_completions_to_print would have no effect",
    "--reward contains:x --method fo-sgd --eps auto": "fo-sgd goes backward, and no gradient passes through a reward",
    "--reward contains:x --method forward-grad": "differentiates forward, and no gradient passes through a reward",
    "--reward contians:x": "did you mean 'contains'",
    "--reward contains:x --reward_weights 1 2": "reward_weights has 2 values for 1 reward functions",
    "--reward contains:x --metric_for_best_model f1": "metric_for_best_model='f1' is no metric of these data",
    "--reward contains:x --guard_task sst3": "--guard_task: unknown task 'sst3'; did you mean 'sst5'",
    "--reward contains:x --guard_file none.jsonl": "--guard_file: there is no file 'none.jsonl'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_reward_cannot_do_is_one_sentence(words: str, tmp_path: Path) -> None:
    usual = ["--model_name_or_path", "my-model", "--train_file", "prompts.jsonl", "--eval_file", "prompts.jsonl"]
    usual += ["--max_completion_length", "4"] if "contains" in words else []
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(run_config.parse([*usual, "--output_dir", str(tmp_path / "run"), *words.split()]))
    assert REFUSED[words] in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_options_of_rewards_are_refused_by_eval_without_one(command: Callable[..., Result]) -> None:
    words = ["eval", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data"]
    result = command(*words, "--max_completion_length", "4")
    assert result.code == 2 and "it is an option of --reward" in result.err
    words += ["--reward", "length:3", "--num_eval", "2", "--max_completion_length", "3", "--num_completions_to_print", "1"]
    rewards = []
    for weight in ("1", "3"):
        evaluated = command(*words, "--reward_weights", weight)
        assert evaluated.code == 0 and evaluated.out.count("This movie is") == 1
        rewards.append(float(evaluated.out.partition("loss")[2].split()[0]))
    assert rewards[1] == pytest.approx(3 * rewards[0]) and rewards[0] < 0
    short = command(*words, "--max_completion_length", "2", "--output_file", "-")
    assert json.loads(short.out)["metrics"]["completion_length"] <= 2
