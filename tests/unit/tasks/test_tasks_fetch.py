"""`zotune tasks --fetch`: rows of a data set in the hub's layout, in a folder, as the files that --data_dir reads."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import pytest

import hub_folders
from command_cases import run_command
from zotune import tasks
from zotune.tasks.fetch import digest, fetch
from zotune.tasks.sources import load_rows


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `nyu-mll/glue`, 40 and 6 rows, which datasets reads as it reads the hub's."""
    rows = [{"sentence": f"film « {i} » ", "label": i % 2, "idx": i} for i in range(40)]
    hub_folders.save(tmp_path, tasks.load("sst2"), {"train": rows, "validation": rows[:6]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_fetched_rows_are_those_that_data_dir_reads(hub, capsys):
    task = tasks.load("sst2")
    printed = run_command(capsys, "tasks", "--fetch", "sst2", "--data_dir", "data", "--num_train", "10").out.splitlines()
    train, evaluation = (load_rows(task, split, hub / "data") for split in ("train", "eval"))
    assert [row["idx"] for row in train] == sorted(random.Random(0).sample(range(40), 10))
    assert [row["idx"] for row in evaluation] == list(range(6)) and evaluation[1]["sentence"] == "film « 1 » "
    assert printed == [
        f"data/sst2/train.jsonl: 10 of 40 rows, digest {digest(task, train)}",
        f"data/sst2/validation.jsonl: 6 of 6 rows, digest {digest(task, evaluation)}",
    ]
    described = run_command(capsys, "tasks", "sst2", "--data_dir", "data").out
    assert f"data/sst2/train.jsonl: 10 rows, digest {digest(task, train)}" in described
    assert digest(task, evaluation) == digest(task, load_rows(task, "eval")) != digest(task, evaluation.select([1, 0, 2, 3, 4, 5]))


def test_a_file_that_is_there_is_not_replaced(hub):
    (hub / "data/sst2").mkdir(parents=True)
    (hub / "data/sst2/validation.jsonl.gz").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"data/sst2/validation.jsonl.gz is there already: move it away"):
        fetch(tasks.load("sst2"), hub / "data")
    assert [path.name for path in (hub / "data/sst2").iterdir()] == ["validation.jsonl.gz"]


def test_a_set_that_is_a_program_has_no_local_export(hub, capsys):
    (hub / "CogComp/trec").mkdir(parents=True)
    (hub / "CogComp/trec/trec.py").write_text("raise SystemExit('it was run')")
    found = run_command(capsys, "tasks", "--fetch", "trec", "--data_dir", "data")
    assert found.code == 2 and "cannot load CogComp/trec (split train)" in found.err and "scripts are no longer supported" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fetch", "sst2"], "--fetch needs --data_dir"),
        (["--fetch", "rte", "--data_dir", "d"], "see to the connection, and to HF_HUB_OFFLINE"),
        (["--fetch", "sst2", "--data_dir", "d", "--num_eval", "0"], "num_eval=0: give 1 or more"),
        (["sst2", "--num_train", "4"], "--num_train goes with --fetch"),
        (["--data_dir", "d"], "--data_dir goes with --fetch"),
        (["sst2", "--data_dir", "d"], "no data folder d"),
        (["sst2", "--fetch", "rte", "--data_dir", "d"], "--fetch takes one task"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(words, message, hub, capsys):
    found = run_command(capsys, "tasks", *words)
    assert found.code == 2 and message in found.err
    assert not (hub / "d").exists()
