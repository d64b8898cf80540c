"""`zotune orders`, from a run's folder to a table of orders and the model of the best one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_cases import Result, run_command, save_data, save_model, weights_digest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orders")
    save_model(folder / "model")
    save_data(folder)
    return folder


def _train(place: Path, capsys: pytest.CaptureFixture[str], output: str, *more: str) -> Result:
    data = place / "data/sst2"
    words = ["train", "--model_name_or_path", str(place / "model"), "--task", "sst2", "--train_file", str(data / "train.jsonl")]
    words += ["--num_train", "24", "--output_dir", str(place / output), "--use_cpu", "true", "--max_steps", "5"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    return run_command(capsys, *words, "--learning_rate", "1e-3", *more)


def test_orders_of_a_run_are_told_and_the_best_is_saved(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert _train(place, capsys, "run", "--method", "lozo").code == 0
    source = [json.loads(line) for line in (place / "data/sst2/train.jsonl").read_text().splitlines()]
    words = ("orders", "model", "run", "--order", "random:2", "shortest", "--out", "orders.jsonl", "--output_dir", "best", "--use_cpu")
    result = run_command(capsys, *words, "--checks", "2")
    assert result.code == 0, result.err
    assert "3 orders of 24 examples in 5 steps. Measuring took 240 sequences, as many as training 3 times" in result.out
    lines = [json.loads(line) for line in (place / "orders.jsonl").read_text().splitlines()]
    assert [line["order"] for line in lines] == ["as trained", "random:0", "random:1", "shortest"]
    assert all(line["coefficient_error"] < 0.9 and line["apart"] > 0 for line in lines[1:])
    assert len({line["training_loss"] for line in lines}) == 4 and all(len(line["losses"]) == 24 for line in lines)
    rows = [int(line) for line in (place / "best/order.txt").read_text().split()]
    assert len(rows) == 5 * 8 and all(0 < row <= len(source) for row in rows)
    again = run_command(capsys, "orders", "model", "run", "--order", "best/order.txt", "--out", "again.jsonl", "--use_cpu", "--checks", "0")
    told = json.loads((place / "again.jsonl").read_text().splitlines()[1])
    best = min(lines, key=lambda line: line["training_loss"])
    assert again.code == 0 and told["losses"] == pytest.approx(best["losses"], abs=1e-5) and told["coefficient_error"] is None
    assert (weights_digest("best") == weights_digest("run")) is (best["order"] == "as trained")


def test_a_row_has_a_loss_for_each_place(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert _train(place, capsys, "adam", "--method", "mezo-adam").code == 0
    run_command(capsys, "orders", "model", "adam", "--order", "reversed", "--out", "rows.jsonl", "--use_cpu")
    row = next(iter(json.loads((place / "rows.jsonl").read_text().splitlines()[0])["losses"]))
    words = ("orders", "model", "adam", "--position", row, "--places", "3", "--checks", "0", "--use_cpu", "--out", "places.jsonl")
    result = run_command(capsys, *words)
    assert result.code == 0 and f"Row {row}: loss" in result.out and "(its own)" in result.out
    own, *lines = [json.loads(line) for line in (place / "places.jsonl").read_text().splitlines()]
    found = {line["losses"][row] for line in lines}
    assert len(lines) >= 3 and len(found) >= 2 and any(loss == pytest.approx(own["losses"][row], abs=1e-5) for loss in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to try"),
        (("--order", "nowhere.txt"), "--order nowhere.txt: there is no such file"),
        (("--order", "random", "--checks", "-1"), "--checks must be at least 0"),
        (("--position", "99999"), "the run has no training row of that number"),
        (("--order", "random", "--output_dir", "model"), "is not empty"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(place)
    if not (place / "plain").exists():
        assert _train(place, capsys, "plain", "--method", "mezo").code == 0
    result = run_command(capsys, "orders", "model", "plain", *words, "--use_cpu")
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1


def test_a_run_whose_directions_follow_the_batch_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert _train(place, capsys, "guided").code == 0
    result = run_command(capsys, "orders", "model", "guided", "--order", "random", "--use_cpu")
    assert result.code == 2 and "other orders cannot be told for lozo-g" in result.err and "take mezo, lozo" in result.err
