"""The page on runs: what it says is what their folders say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from command_cases import run_command
from zotune.publishing.report import read, report

WORDS = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--learning_rate", "1e-3", "--logging_steps", "1"]
WORDS += ["--per_device_train_batch_size", "4", "--num_train", "8", "--num_dev", "4", "--num_eval", "4", "--max_steps", "4"]


@pytest.fixture
def runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> list[Path]:
    for name, method, *more in (("a", "lozo", "--save_steps", "2"), ("b", "mezo", "--save_strategy", "no")):
        done = run_command(capsys, "train", *WORDS, "--method", method, *more, "--output_dir", str(workplace / name))
        assert done.code == 0, done.err
    return [workplace / "a", workplace / "b"]


def test_a_page_shows_results_options_and_commands(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(capsys, "report", *map(str, runs), "--out", "pages/two.html").code == 0
    text = Path("pages/two.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?http", text)  # self-contained
    differing = text.split("Options that differ")[1].split("<h2>")[0]
    assert "<td>lozo</td><td>mezo</td>" in differing
    assert "learning_rate" not in differing
    for folder in runs:
        accuracy = json.loads((folder / "summary.json").read_text())["after"]["accuracy"]
        row = next(line for line in re.findall(r"<tr>.*?</tr>", text) if f">{folder.name}<" in line)
        assert f"{100 * accuracy:.1f} %" in row
        assert f"zotune replay {Path('my-model').resolve()} {folder}" in text
    assert text.count("<svg") == 2  # curves and memory
    for folder in runs:
        found, summary = (json.loads((folder / name).read_text()) for name in ("predictions.json", "summary.json"))
        before = json.loads((folder / "zotune_run.json").read_text())["before"]["accuracy"]
        gained = 4 * (summary["after"]["accuracy"] - before)
        assert found["became_right"] - found["became_wrong"] == gained and len(found["before"]) == 4
        assert f"{found['became_right']} became right and {found['became_wrong']} became wrong" in text
    again = run_command(capsys, "report", str(runs[0]), str(runs[0]))
    assert (again.code, "named twice" in again.err) == (2, True)


def test_a_run_that_has_not_ended_is_shown_so_far(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (runs[0] / "summary.json").unlink()
    (runs[0] / "history.json").write_text("{")  # of no account before the end
    assert read(runs[0], "a").entries[-1]["step"] == 4
    assert "Not ended, shown up to the last checkpoint: a." in report(runs)
    (runs[1] / "history.json").write_text("{")
    damaged = run_command(capsys, "report", *map(str, runs))
    assert damaged.code == 2
    assert "history.json is damaged" in damaged.err
