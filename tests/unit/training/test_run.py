"""`training.run`: one fine-tuning run as a function, which prints nothing and reports to an observer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zotune.training import run_config
from zotune.training.observer import RunObserver, RunStart
from zotune.training.run import RunResult, run

WORDS = ("--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--output_dir", "run", "--use_cpu")


class Recorder(RunObserver):
    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, start: RunStart) -> None:
        self.events.append(f"begin {start.data} {start.sizes['to train on']}")

    def evaluated(self, when: str, metric: str, value: float) -> None:
        self.events.append(f"{when} {metric}")

    def stopped(self) -> None:
        self.events.append("stopped")

    def finished(self, result: RunResult) -> None:
        self.events.append(f"finished {result.summary['steps']}")


@pytest.fixture
def here(workplace: Path) -> Path:
    return workplace


def test_a_run_returns_its_result_reports_events_prints_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observer = Recorder()
    result = run(run_config.parse([*WORDS, "--max_steps", "4", "--save_strategy", "no"]), observer)
    assert observer.events == ["begin sst2 48", "before training accuracy", "stopped", "after training accuracy", "finished 4"]
    assert result.summary == json.loads((here / "run/summary.json").read_text()) and result.folder == Path("run")
    assert result.before == result.summary["before"] and result.after == result.summary["after"]
    assert result.history == json.loads((here / "run/history.json").read_text())["entries"]
    assert capsys.readouterr().out == ""


def test_memory_is_predicted_before_the_model_is_loaded(here: Path) -> None:
    asked = []

    def predict(model, plan, training, data, method, scheme):
        asked.append((plan.name, method.name, scheme.scheme, len(data.train)))
        raise ValueError("no more than that")

    with pytest.raises(ValueError, match="no more than that"):
        run(run_config.parse([*WORDS, "--method", "lozo"]), predict_needs=predict)
    assert asked == [(str(here / "my-model"), "lozo", "full", 48)] and not (here / "run").exists()


def test_a_baseline_without_steps_is_a_run_too(here: Path) -> None:
    observer = Recorder()
    result = run(run_config.parse([*WORDS, "--method", "zero-shot"]), observer)
    assert observer.events == ["begin sst2 0", "before training accuracy", "finished 0"]
    assert result.before == result.after and result.summary["trainable_parameters"] == 0
