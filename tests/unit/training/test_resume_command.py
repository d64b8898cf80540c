"""`zotune train --resume_from_checkpoint`: options and data are compared with `zotune_run.json`, changes are written there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_cases import Result, run_command, save_data, save_model

WORDS = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--output_dir", "run", "--num_eval", "4"]
WORDS += ["--learning_rate", "1e-3", "--num_train", "20", "--method", "lozo", "--max_steps"]
RESUME = [*WORDS, "3", "--resume_from_checkpoint", "true"]


@pytest.fixture(scope="module")
def workplaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from zotune.cli.main import main

    folder = tmp_path_factory.mktemp("work")
    save_model(folder / "my-model")
    save_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "2", "--save_steps", "1"]) == 0
    return folder


@pytest.fixture
def workplace(workplaces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(workplaces, tmp_path, dirs_exist_ok=True)
    run = (tmp_path / "run/zotune_run.json").read_text().replace(str(workplaces), str(tmp_path))
    (tmp_path / "run/zotune_run.json").write_text(run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *words: run_command(capsys, *words)


@pytest.mark.parametrize("without", [[], ["checkpoint-1", "checkpoint-2"]], ids=["checkpoint", "journal"])
def test_other_options_are_refused_and_named(without: list[str], workplace: Path, command: Callable[..., Result]) -> None:
    for name in without:
        shutil.rmtree(workplace / "run" / name)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    cases = {
        "--template this-movie-is-good": "template was None and is 'this-movie-is-good'",
        "--objective choices": "objective was None and is 'choices'",
        "--max_length 30": "max_length was None and is 30",
        "--num_train 10": "num_train was 20 and is 10",
        "--scheme bias": "scheme was 'full' and is 'bias'",
        "--lr_scheduler_type linear": "lr_scheduler_type was 'warmup_stable_decay' and is 'linear'",
        "--data_seed 3": "data_seed was None and is 3",
        "--dtype bfloat16": "the run's weights are float32, and those of this model bfloat16",
        "--gradient_accumulation_steps 2": "a step of the run takes 16 examples",
    }
    for words, message in cases.items():
        result = command(*RESUME, *words.split())
        assert result.code == 2 and message in result.err, (words, result.err)
    (workplace / "data/sst2/train.jsonl").write_text((workplace / "data/sst2/train.jsonl").read_text().replace("film", "movie"))
    assert "the training examples are not those of the run (20 then, 20 now; their files" in command(*RESUME).err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_changes_that_are_allowed_are_recorded(workplace: Path, command: Callable[..., Result]) -> None:
    Path("data").rename("moved")
    result = command(*[word if word != "data" else "moved" for word in RESUME], "--per_device_eval_batch_size", "4")
    assert result.code == 0, result.err
    run = json.loads(Path("run/zotune_run.json").read_text())
    (entry,) = run["resumed"]
    assert entry["changed"] == {
        "data_dir": [str(workplace / "data"), str(workplace / "moved")],
        "max_steps": [2, 3],
        "save_steps": [1, 500],
        "per_device_eval_batch_size": [16, 4],
    }
    assert run["training_arguments"]["max_steps"] == 3
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["resumed"] == run["resumed"] and summary["learning_rate"] == 1e-3 and summary["steps"] == 3


WRONG: dict[str, Any] = {
    "classes": 3, "before": "much", "before ": {"accuracy": "high"}, "dtype": ["float32"], "base_model": None, "versions": {"zotune": 1},
    "resumed": {}, "examples": {"count": "20", "digest": ""}, "base": 5, "batch": {"per_device": 16}, "training_arguments": [],
    "data_arguments": {"num_eval": "4"}, "model_arguments": {"quantize": "int3"}, "scheme": {"lora_r": 1.5}, "started": 4,
}  # fmt: skip


def test_a_run_file_with_a_wrong_type_is_one_sentence(workplace: Path, command: Callable[..., Result]) -> None:
    path = Path("run/zotune_run.json")
    right = json.loads(path.read_text())
    for name, value in WRONG.items():
        path.write_text(json.dumps({**right, name.strip(): value}))
        for words in (RESUME, ["eval", "--model_name_or_path", "run"], ["replay", "my-model", "run", "--output_dir", "out"]):
            result = command(*words)
            assert result.code == 2 and "zotune_run.json is damaged" in result.err, (name, result.err)
    assert not Path("out").exists()
