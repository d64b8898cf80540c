"""`zotune train` on a table with labels: names of columns from a file of options, validation rows, resumption, other rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from command_cases import BAD, GOOD, run_command, save_model, weights_digest


def write(path: str, *rows: tuple[str, str]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("body", "kind"), *rows])


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "my-model")
    rows = [(f"the film is {word}", kind) for kind, words in (("great", GOOD), ("terrible", BAD)) for word in words]
    write("a.csv", *rows)
    write("b.csv", *rows[::-1])
    Path("run.yaml").write_text(
        "model_name_or_path: my-model\ntrain_file: a.csv\nvalidation_file: b.csv\ncolumns: {text: body, label: kind}\n"
        "attribute: b.csv\nattribute_every: 1\nmethod: lozo\nlearning_rate: 1e-3\nlr_scheduler_type: constant\n"
        "save_steps: 2\nper_device_train_batch_size: 4\n"
    )
    return ["--config", "run.yaml", "--use_cpu"]


@pytest.mark.slow
def test_a_run_on_labels_resumes_and_judges_other_rows(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for folder, steps in (("whole", "4"), ("part", "2")):
        assert run_command(capsys, "train", *options, "--max_steps", steps, "--output_dir", folder).code == 0
    resumed = run_command(capsys, "train", *options, "--max_steps", "4", "--output_dir", "part", "--resume_from_checkpoint", "true")
    assert resumed.code == 0, resumed.err
    assert weights_digest("part") == weights_digest("whole")
    assert len(Path("whole/attributed_rows.jsonl").read_text().splitlines()) == 8
    write("c.csv", ("the film is fine", "great"))  # one class alone: those of the run count
    found = run_command(capsys, "eval", "--model_name_or_path", "part", "--eval_file", "c.csv", "--output_file", "-")
    assert found.code == 0, found.err
    assert json.loads(found.out)["examples"] == 1 and json.loads(found.out)["prompt"] == "{text}\nKind:"
    write("d.csv", ("the film is fine", "graet"))
    wrong = run_command(capsys, "eval", "--model_name_or_path", "part", "--eval_file", "d.csv")
    assert wrong.code == 2 and "d.csv, line 2: column 'label' holds 'graet'" in wrong.err and wrong.err.count("\n") == 1
    write("a.csv", ("the film is fine", "great"), ("the plot is dull", "terrible"))
    other = run_command(capsys, "train", *options, "--max_steps", "6", "--output_dir", "part", "--resume_from_checkpoint", "true")
    assert other.code == 2 and "the training examples are not those of the run" in other.err
