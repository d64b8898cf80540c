"""`zotune train --attribute` and `zotune influence`, from a training file to a list of its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_cases import run_command, save_data, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("influence")
    save_model(folder / "model")
    save_data(folder)
    return folder


def _words(place: Path, output: str, *more: str) -> list[str]:
    data = place / "data/sst2"
    words = ["train", "--model_name_or_path", str(place / "model"), "--task", "sst2", "--train_file", str(data / "train.jsonl")]
    words += ["--num_train", "40", "--attribute", str(data / "validation.jsonl"), "--output_dir", str(place / output), "--use_cpu", "true"]
    return [*words, "--learning_rate", "1e-3", "--per_device_train_batch_size", "8", *more]


def test_a_run_lists_its_rows_by_share(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    train = run_command(capsys, *_words(place, "run", "--method", "mezo", "--max_steps", "5", "--attribute_every", "1"))
    assert train.code == 0, train.err
    result = run_command(capsys, "influence", "run", "--top", "3", "--out", "shares.jsonl", "--plot", "shares.png")
    assert result.code == 0, result.err
    assert "40 examples in 5 measured of 5 steps of mezo" in result.out
    assert "sum of the shares" in result.out and "curvature" in result.out and "measured change" in result.out
    lines = [json.loads(line) for line in (place / "shares.jsonl").read_text().splitlines()]
    source = [json.loads(line) for line in (place / "data/sst2/train.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and all(line["row"] == source[int(line["label"]) - 1] for line in lines)
    assert [line["share"] for line in lines] == sorted((line["share"] for line in lines), reverse=True)
    assert (place / "shares.png").read_bytes().startswith(b"\x89PNG")
    classes = run_command(capsys, "influence", "run", "--by", "label")
    assert classes.code == 0 and "label" in classes.out
    assert run_command(capsys, "verify", "run").code == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "take mezo, lozo, lozo-e"),  # lozo-g is the default
        (("--method", "fo-adamw"), "choose a zeroth-order method"),
        (("--method", "mezo", "--attribute_every", "0"), "attribute_every must be at least 1"),
        (("--method", "mezo", "--attribute", "nowhere.jsonl"), "--attribute: there is no file"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    result = run_command(capsys, *_words(place, "refused", *more))
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1
    assert not (place / "refused").exists()


def test_a_run_without_contributions_says_how_to_get_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model_name_or_path", str(place / "model"), "--train_file", str(place / "my.jsonl"), "--method", "mezo"]
    run_command(capsys, *words, "--learning_rate", "1e-3", "--max_steps", "1", "--output_dir", str(place / "plain"), "--use_cpu", "true")
    result = run_command(capsys, "influence", str(place / "plain"))
    assert result.code == 2 and "--attribute VALIDATION.jsonl" in result.err
    assert "there is no journal" in run_command(capsys, "influence", str(place / "nothing")).err
