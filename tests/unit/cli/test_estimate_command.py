"""`zotune estimate`: the tables, what is refused, and the process's real peak."""

from __future__ import annotations

import json

import pytest
from transformers import GPT2Config

from command_cases import run_command
from memory_models import MODELS


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    MODELS["llama"].to_json_file(path)
    return str(path)


def test_estimate_compares_methods_and_draws(model, tmp_path, capsys):
    chart, table = tmp_path / "bars.png", tmp_path / "table.json"
    words = ["--model_name_or_path", model, "--method", "zero-shot", "mezo", "fo-adamw", "--batch_size", "2", "--sequence_length", "16"]
    result = run_command(capsys, "estimate", *words, "--chart", str(chart), "--json", str(table))
    assert result.code == 0, result.err
    rows = {row["method"]: row for row in json.loads(table.read_text())}
    assert rows["zero-shot"]["total"] < rows["mezo"]["total"] < rows["fo-adamw"]["total"]
    assert rows["fo-adamw"]["gradients"] > 0 == rows["mezo"]["gradients"]
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "no weight was read" in result.out and "½|x|" in result.out


def test_what_fits_a_card_does_and_twice_as_much_does_not(model, tmp_path, capsys):
    words = ["--model_name_or_path", model, "--method", "zero-shot", "--sequence_length", "16", "--dtype", "float32"]
    assert run_command(capsys, "estimate", *words, "--memory", "5MB", "--json", str(tmp_path / "a.json")).code == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())
    for factor, fits in ((1, True), (2, False)):
        size = ["--batch_size", str(factor * row["batch"]), "--json", str(tmp_path / "b.json")]
        assert run_command(capsys, "estimate", *words, *size).code == 0
        assert (json.loads((tmp_path / "b.json").read_text())[0]["total"] <= 5_000_000) is fits


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "mezzo"], "did you mean 'mezo'"),
        (["--memory", "lots"], "such as 24GB"),
        (["--sequence_length", "65"], "at most 64 tokens"),
        (["--batch_size", "0"], "at least 1"),
        (["--scored_tokens", "256"], "less than --sequence_length"),
        (["--lora_r", "4"], "option of another scheme"),
        (["--method_args", "{rank: 2}"], "must be JSON"),
        (["--method_args", '{"wings": 2}'], "none of the methods takes the option 'wings'"),
        (["--modell", "x"], "did you mean"),
    ],
)
def test_what_is_wrong_is_one_sentence(words, says, model, capsys):
    length = [] if "--sequence_length" in words or "--scored_tokens" in words else ["--sequence_length", "16"]
    if "--scored_tokens" in words:
        length, words = ["--sequence_length", "16"], ["--scored_tokens", "16"]
    result = run_command(capsys, "estimate", "--model_name_or_path", model, *length, *words)
    assert result.code == 2 and says in result.err and result.err.count("\n") == 1


@pytest.mark.slow
def test_the_process_grows_by_what_was_predicted(tmp_path, capsys):
    config = GPT2Config(n_layer=2, n_embd=512, n_head=8, vocab_size=16000, n_positions=128, bos_token_id=0, eos_token_id=0)
    config.architectures = ["GPT2LMHeadModel"]
    config.to_json_file(tmp_path / "config.json")
    words = ["--model_name_or_path", str(tmp_path / "config.json"), "--batch_size", "16", "--sequence_length", "64", "--device", "cpu"]
    words += ["--method", "fo-sgd", "--measure", "--json", str(tmp_path / "m.json")]
    result = run_command(capsys, "estimate", *words)
    assert result.code == 0, result.err
    assert result.out.count("  measured ") == result.out.count("the process grew by") == 1
    for row in json.loads((tmp_path / "m.json").read_text()):
        assert row["total"] == pytest.approx(row["process"], rel=0.05), row["method"]
        assert row["total"] == pytest.approx(row["measured"]["total"], rel=0.02), row["method"]
