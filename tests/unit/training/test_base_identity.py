"""An adapter is evaluated and trained on over the base model that it was trained on, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from command_cases import Result, run_command
from trainer_cases import trainer
from zotune.training import base_identity
from zotune.training.schemes import apply

pytest.importorskip("peft")
TRAIN = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--output_dir", "run", "--num_eval", "4"]
TRAIN += ["--method", "mezo", "--learning_rate", "1e-2", "--max_steps", "2", "--save_steps", "1", "--scheme"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *words: run_command(capsys, *words)


def change_base(name: str = "model.norm.weight") -> None:
    path = "my-model/model.safetensors"
    weights = load_file(path)
    save_file({**weights, name: weights[name] + 0.01}, path, metadata={"format": "pt"})


def evaluate(command: Any, *words: str, model: str = "run") -> Result:
    return command("eval", "--model_name_or_path", model, "--num_eval", "4", *words)


@pytest.mark.filterwarnings("ignore:no batched evaluation")
@pytest.mark.parametrize("words", [["lora"], ["prefix"], ["lora", "--quantize", "int8"], ["lora", "--dtype", "bfloat16"]], ids=" ".join)
def test_an_adapter_over_another_base_is_refused(words: list[str], workplace: Path, command: Callable[..., Result]) -> None:
    assert (result := command(*TRAIN, *words)).code == 0, result.err
    for dtype in ("float32", "bfloat16"):
        for model in ("run", "run/checkpoint-1"):
            assert (result := evaluate(command, "--dtype", dtype, model=model)).code == 0, result.err
    change_base()
    for model in ("run", "run/checkpoint-1"):
        result = evaluate(command, model=model)
        assert result.code == 2 and "was trained on another base model" in result.err
    result = command(*TRAIN, *words, "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert result.code == 2 and "another base model" in result.err
    continued = [
        "--task",
        "sst2",
        "--data_dir",
        "data",
        "--output_dir",
        "more",
        "--max_steps",
        "1",
        "--method",
        "mezo",
        "--learning_rate",
        "1",
    ]
    result = command("train", "--model_name_or_path", "run", *continued)
    assert result.code == 2 and "was trained on another base model" in result.err
    result = command("replay", "my-model", "run", "--output_dir", "again")
    assert result.code == 2 and "not the one the journal starts from" in result.err
    result = command("merge", "my-model", "run", "--output_dir", "merged")
    assert result.code == 2 and ("not the one the journal starts from" in result.err or "merge runs without --quantize" in result.err)


def test_an_adapter_that_the_trainer_saved_names_its_base(workplace: Path, command: Callable[..., Result]) -> None:
    base = AutoModelForCausalLM.from_pretrained("my-model", dtype=torch.float32)
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
    run = trainer(workplace / "run", apply(base, "lora"), method="mezo", max_steps=1, train_dataset=rows, data_collator=None)
    run.train()
    run.save_model(str(workplace / "saved"))
    assert json.loads(Path("saved", base_identity.FILE).read_text())["dtypes"] == ["float32"]
    words = ["--task", "sst2", "--data_dir", "data"]
    assert (result := evaluate(command, *words, model="saved")).code == 0, result.err
    change_base()
    result = evaluate(command, *words, model="saved")
    assert result.code == 2 and "was trained on another base model" in result.err
    Path("saved", base_identity.FILE).write_text('{"digest": 3}')
    assert "is damaged" in evaluate(command, *words, model="saved").err
    shutil.rmtree("my-model")
    assert evaluate(command, *words, model="saved").code == 2
