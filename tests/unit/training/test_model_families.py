"""Runs of other models than causal language models: trained, saved, loaded by the library of their users, evaluated again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_cases import Result, run_command, save_encoder
from family_cases import number, several, ticket, write_rows

SHORT = ("--use_cpu", "--max_steps", "2", "--eval_steps", "2", "--learning_rate", "1e-2", "--train_file", "train.jsonl")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(capsys: pytest.CaptureFixture[str], *words: str) -> Result:
    return run_command(capsys, "train", "--model_name_or_path", "model", *SHORT, "--eval_file", "eval.jsonl", "--output_dir", "run", *words)


def same_metrics(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The metrics after training, which `zotune eval` of the saved model gives again."""
    after = json.loads(Path("run/summary.json").read_text())["after"]
    result = run_command(capsys, "eval", "--model_name_or_path", "run", "--use_cpu", "--output_file", "found.json")
    assert result.code == 0, result.err
    found = json.loads(Path("found.json").read_text())["metrics"]
    names = [name for name in after if name not in ("runtime", "samples_per_second", "steps_per_second")]
    assert {name: found[name] for name in names} == pytest.approx({name: after[name] for name in names}, abs=1e-5)
    return found


def replays(capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether base model and journal give the saved weights."""
    assert run_command(capsys, "replay", "model", "run/journal.zo", "--output_dir", "again", "--use_cpu").code == 0
    one, other = load_file("run/model.safetensors"), load_file("again/model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- heads of texts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "words", "metrics", "outputs", "problem"),
    [
        (number, ["--method", "lozo"], {"pearson", "spearman", "mse"}, 1, "regression"),
        (several, ["--scheme", "lora"], {"micro_f1", "macro_f1"}, 2, "multi_label_classification"),
        (ticket, ["--problem_type", "single_label_classification"], {"accuracy", "f1"}, 4, "single_label_classification"),
    ],
)
def test_a_head_is_trained_saved_and_evaluated(here, capsys, draw, words, metrics, outputs, problem):
    save_encoder(here / "model", initializer_range=0.25)
    write_rows(here, draw)
    result = trained(capsys, *words)
    assert result.code == 0, result.err
    assert metrics <= same_metrics(capsys).keys()
    if "lora" in words:
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained("run", num_labels=outputs)
        assert model.config.num_labels == outputs
        return
    from transformers import AutoModelForSequenceClassification

    config = AutoModelForSequenceClassification.from_pretrained("run").config
    assert (config.num_labels, config.problem_type) == (outputs, problem)
    assert replays(capsys)


@pytest.mark.parametrize(
    ("rows", "words", "reason"),
    [
        (
            [{"text": "the film", "label": 0.5}, {"text": "the film", "label": "good"}],
            [],
            "holds labels that are no classes: each is a name or a whole number",
        ),
        ([{"text": "the film", "labels": ["good", 3]}] * 2, [], "is none of the classes"),
        ([{"text": "the film", "label": "good"}] * 2, [], "has one label only, 'good'"),
        (
            [{"text": "a", "label": "good"}, {"text": "a", "label": "bad"}],
            ["--problem_type", "regression"],
            "a number, or a list of numbers",
        ),
        ([{"text": "the film"}] * 2, ["--objective", "classifier"], "has no labels for a classification head"),
    ],
)
def test_labels_that_fit_no_head_are_refused(here, capsys, rows, words, reason):
    save_encoder(here / "model")
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("eval.jsonl").write_text(Path("train.jsonl").read_text())
    result = trained(capsys, *words)
    assert result.code == 2 and reason in result.err and not Path("run").exists()
