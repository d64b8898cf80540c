"""`report_to` trackio and wandb, which keep a run on this machine: the figures of the log and a table of completions arrive there."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from transformers.integrations import integration_utils

from trainer_cases import trainer
from zotune.rewards.evaluation import Shown
from zotune.training.completions import report

FIGURES = {"train/loss", "train/loss_diff", "train/forward_passes", "train/learning_rate", "train/global_step"}
SHOWN = [Shown(0, "the film was", "good", 1, {"length": 4.0})]
WHY = "{} is not installed: `make setup` leaves it out, as it brings many packages"


@pytest.mark.filterwarnings("ignore")
def test_trackio_gets_the_figures_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason=WHY.format("trackio"))
    run = trainer(tmp_path / "run", report_to="trackio", project="films", run_name="first")
    run.train()
    with sqlite3.connect(tmp_path / "trackio" / "films.db") as base:
        logged = [json.loads(row[0]) for row in base.execute("select metrics from metrics where run_name = 'first' order by id")]
    assert [each["train/global_step"] for each in logged[:3]] == [2, 4, 6] and logged[0].keys() >= FIGURES
    trackio.init(project="films", name="second")
    report([integration_utils.TrackioCallback()], 6, SHOWN)
    trackio.finish()
    with sqlite3.connect(tmp_path / "trackio" / "films.db") as base:
        (row,) = base.execute("select metrics from metrics where run_name = 'second'").fetchone()
    assert "completions" in json.loads(row)


@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_the_figures_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason=WHY.format("wandb"))
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "WANDB_PROJECT": "films"}.items():
        monkeypatch.setenv(name, value)
    import wandb

    run = trainer(tmp_path / "run", report_to="wandb", run_name="first")
    run.train()
    report(run.callback_handler.callbacks, 6, SHOWN)
    wandb.log({})  # the table goes with the next figures
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary.keys() >= {*FIGURES, "completions"} and summary["train/global_step"] == 6
    assert list(tmp_path.rglob("run-*.wandb"))
