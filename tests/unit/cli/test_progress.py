"""The progress of a run says how long it will take, evaluations included, and fits its terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from zotune.cli import progress
from zotune.cli.progress import RunProgress


def shown(monkeypatch: pytest.MonkeyPatch, console: Console, seconds: float, evaluated: float = 0.0, first: int = 0, step: int = 25) -> str:
    """What stands on the console at a step of 100, so many seconds after the first one of this process."""
    clock = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    state, control = TrainerState(max_steps=100, global_step=first), TrainerControl()
    bar = RunProgress(console, "accuracy", 0.5)
    bar.on_train_begin(None, state, control)
    state.global_step = step
    clock[0] += seconds
    bar.on_log(None, state, control, logs={"loss": 0.25})
    bar.on_step_end(None, state, control, optimizer=SimpleNamespace(forward_passes=123456, last_report=None))
    if evaluated:
        bar.on_evaluate(None, state, control, metrics={"eval_accuracy": 0.875, "eval_runtime": evaluated})
        state.global_step += 5
        clock[0] += 10
        bar.on_step_end(None, state, control, optimizer=SimpleNamespace(forward_passes=123456, last_report=None))
    bar.close()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_lines_say_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Console(file=io.StringIO(), width=120), 50.0, evaluated=20.0)
    assert "step 25/100  loss 0.250  accuracy 87.5 %  2.0 s/step  2:30 left" in text, "a quarter took 50 s; the evaluation's 20 s counts"
    assert "step 30/100  loss 0.250  accuracy 87.5 %  1.3 s/step  2:20 left  123456 forwards" in text
    resumed = shown(monkeypatch, Console(file=io.StringIO(), width=120), 50.0, first=80, step=90)
    assert "50 s" not in resumed and "5.0 s/step  0:50 left" in resumed, "by the steps of this process"
    assert "left" not in shown(monkeypatch, Console(file=io.StringIO(), width=120), 50.0, step=100)
    assert progress.rest_text(4000) == "1:06:40"


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_says_what_is_left_in_one_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    text = shown(monkeypatch, console, 50.0)
    last = [line for line in text.replace("\r", "\n").split("\n") if "25/100" in line][-1]
    assert "2:30 left" in last and ("123456 forwards" in last) == (width == 120)
