"""`zotune bench`: what a grid file may say, which cell is chosen, and that a killed bench ends as an unbroken one does."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import paths
from command_cases import run_command, save_data, save_model
from zotune import bench
from zotune.bench import figures, grid, runner
from zotune.bench.document import Paragraph, Table, markdown, page
from zotune.bench.plan import Run, cells, check
from zotune.bench.selection import best_of, due, total

READY = sorted((paths.ROOT / "benchmarks/grids").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "models": ["my-model"],
    "tasks": ["sst2"],
    "seeds": [0, 1],
    "budget": {"steps": 8},
    "options": {"num_dev": 8, "eval_steps": 4, "save_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 4},
    "methods": [
        "zero-shot",
        {"method": "mezo", "grid": {"learning_rate": ["1e-3", 0.1]}, "options": {"eps": 1e-3}},
        {"method": "fo-adamw", "label": "AdamW", "options": {"learning_rate": 1e-3}},
    ],
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SMALL), **changes}


# -- the file -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_every_ready_grid_is_one_whose_runs_zotune_train_takes(path: Path) -> None:
    assert check(bench.load(path), None, models=False)


def test_there_are_the_grids_of_the_fields_tables() -> None:
    assert {path.stem for path in READY} >= {"mezo_table1", "mezo_roberta", "lozo_table2", "zobench_sst2", "jaguar", "small"}


PUBLISHED = {"source": "x", "columns": ["sst2"], "rows": {"mezo": [1.0]}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modles": ["x"]}, "unknown key 'modles', did you mean 'models' (there are"),
        ({"models": []}, "'models' is missing"),
        ({"tasks": "sst2"}, "tasks is a list, not 'sst2'"),
        ({"tasks": ["sst2", "sst2"]}, "'sst2' is there twice"),
        ({"budget": {"step": 8}}, "budget: unknown 'step', did you mean 'steps' (there are"),
        ({"budget": {"steps": 0}}, "budget.steps is a whole number of at least 1, not 0"),
        ({"budget": {"steps": 8, "sequences": 8}}, "budget is one of steps, forward_passes, sequences"),
        ({"seeds": [0, 0]}, "seeds: 0 is there twice"),
        ({"seeds": [True]}, "seeds is a list of whole numbers"),
        ({"options": {"seed": 3}}, "options: 'seed' is set by the bench; it goes under `seeds`"),
        ({"options": {"protocol": "mezo"}}, "options: 'protocol' is set by the bench; it goes under `protocol`"),
        ({"protocol": "mzeo"}, "unknown protocol 'mzeo', did you mean 'mezo' (there are"),
        ({"options": {"output_dir": "x"}}, "options: 'output_dir' is set by the bench itself"),
        ({"methods": ["mezo", "mezo"]}, "methods[1]: 'mezo' is there twice for the same task and scheme"),
        ({"methods": [{"method": "mezo", "grid": {"learning_rate": 1e-3}}]}, "methods[0].grid.learning_rate is a list of values"),
        ({"methods": [{"method": "mezo", "grid": {"eps": [1e-3]}, "options": {"eps": 1}}]}, "'eps' is both in `options` and in `grid`"),
        ({"methods": [{"method": "mezo", "schemes": ["loar"]}]}, "methods[0].schemes: unknown 'loar'"),
        ({"methods": [{"label": "x"}]}, "methods[0].method is missing"),
        ({"published": [{**PUBLISHED, "columns": ["sst"]}]}, "published[0].columns: unknown 'sst', did you mean 'sst2' (there are"),
        ({"published": [{**PUBLISHED, "rows": {"mezo": [1, 2]}}]}, "'mezo' has 2 figures for 1 columns"),
        ({"published": [{**PUBLISHED, "rows": {"mezo": ["good"]}}]}, "'mezo' has 'good', which is not a number"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        grid.parsed(changed(**changes))
    assert sentence in str(caught.value).replace("; did", ", did")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["mzeo"]}, "unknown method 'mzeo'"),
        ({"tasks": ["sst22"]}, "unknown task 'sst22'; did you mean 'sst2'"),
        ({"methods": [{"method": "mezo", "options": {"esp": 1e-3}}]}, "mezo on sst2 (my-model, full), seed 0: unknown option '--esp'"),
        ({"methods": [{"method": "mezo", "grid": {"rank": [1, 2]}}]}, "rank"),
        ({"methods": [{"method": "zero-shot", "grid": {"dtype": ["float32", "bfloat16"]}}]}, "zero-shot takes no steps"),
        ({"methods": [{"method": "mezo", "grid": {"eps": [1e-3, 1e-2]}}], "options": {}}, "no examples are held out to choose one by"),
        ({"methods": ["mezo"], "budget": {"sequences": 20}}, "the budget of 20 sequences is less than one step of mezo"),
    ],
)
def test_a_mistake_in_a_run_is_one_sentence_before_anything_runs(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(grid.parsed(changed(**changes)), None, models=False)
    assert sentence in str(caught.value)


def test_the_command_names_the_file_and_writes_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("models: [x\ntasks:")
    assert "bad.yaml, line 2: this is not YAML" in run_command(capsys, "bench", "bad.yaml").err
    Path("other.yaml").write_text(yaml.safe_dump(changed(models=["no-model"])))
    result = run_command(capsys, "bench", "other.yaml")
    assert result.code == 2
    assert "other.yaml: zero-shot on sst2 (no-model, full), seed 0: there is no model folder 'no-model'" in result.err
    assert "at least 1" in run_command(capsys, "bench", "other.yaml", "--processes", "0").err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "other.yaml"]


# -- the plan -----------------------------------------------------------------------------------------------------------------------


def test_a_differing_option_makes_another_run_and_folder() -> None:
    (mezo,) = (found for place, found in cells(grid.parsed(SMALL)).items() if place.method == "mezo")
    keys = {cell.key(seed) for cell in mezo for seed in (0, 1)}
    assert len(keys) == 4
    assert all(key.startswith("my-model_sst2_full_mezo_") for key in keys)
    (again, _) = next(found for place, found in cells(grid.parsed(changed(options={"num_dev": 9}))).items() if place.method == "mezo")
    assert again.key(0) not in keys
    assert [cell.tried for cell in mezo] == [{"learning_rate": 1e-3}, {"learning_rate": 0.1}]  # YAML reads 1e-3 as a text


@pytest.mark.parametrize(
    ("kind", "amount", "mezo", "adam"), [("steps", 8, 8, 8), ("forward_passes", 60, 30, 20), ("sequences", 240, 30, 20)]
)
def test_a_budget_is_the_steps_it_pays_for(kind: str, amount: int, mezo: int, adam: int) -> None:
    found = cells(grid.parsed(changed(budget={kind: amount})))
    steps = {place.method: options[0].options.get("max_steps") for place, options in found.items()}
    assert steps == {"zero-shot": None, "mezo": mezo, "AdamW": adam}


def test_only_the_best_held_out_cell_runs_under_all_seeds() -> None:
    places = cells(grid.parsed(SMALL))
    mezo = next(found for place, found in places.items() if place.method == "mezo")
    results: dict[Run, dict[str, Any]] = {}
    assert best_of(mezo, (0,), results.get) is None
    assert len([run for run in due(places, (0, 1), (0,), results.get) if run.cell in mezo]) == 2
    for cell, (held, test) in zip(mezo, [(0.6, 0.9), (0.7, 0.5)], strict=True):
        summary = {"metric": "accuracy", "held_out": {"accuracy": held, "loss": 1.0}, "after": {"accuracy": test}}
        results[Run(cell, 0)] = {"status": "done", "summary": summary}
    assert best_of(mezo, (0,), results.get) is mezo[1]  # though the other is better on the test examples
    wanted = due(places, (0, 1), (0,), results.get)
    assert [(run.cell, run.seed) for run in wanted if run.cell in mezo] == [(mezo[0], 0), (mezo[1], 0), (mezo[1], 1)]
    assert len(wanted) == total(places, (0, 1), (0,)) == 7
    results[Run(mezo[1], 0)] = {"status": "diverged", "reason": "not finite"}
    assert best_of(mezo, (0,), results.get) is mezo[0]


def test_several_gpus_are_dealt_out_to_the_runs(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [runner.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert runner.environment(1) == {}


# -- the report's parts ---------------------------------------------------------------------------------------------------------------


def test_a_page_escapes_what_it_shows_and_stands_alone() -> None:
    blocks = [Paragraph("a < b"), Table(("x|y",), [("<script>",)])]
    shown = page("T & U", blocks)
    assert "a &lt; b" in shown and "&lt;script&gt;" in shown and "<script>" not in shown and "T &amp; U" in shown
    assert "http" not in shown
    assert "| x\\|y |\n|---|" in markdown("T", blocks, "figures")


def test_a_curve_is_the_mean_over_runs_at_their_common_steps() -> None:
    histories = [
        [{"step": 1, "seconds": 1.0, "loss": 2.0}, {"step": 2, "seconds": 2.0, "loss": 1.0}, {"step": 3, "seconds": 3.0, "loss": 0.0}],
        [{"step": 1, "seconds": 3.0, "loss": 4.0}, {"step": 2, "seconds": 4.0, "loss": 3.0}, {"step": 2, "eval_accuracy": 0.5}],
    ]
    assert figures.curve(histories, "seconds", "loss") == [(2.0, 3.0, 2.0, 4.0), (3.0, 2.0, 1.0, 3.0)]


# -- a bench, whole and killed ------------------------------------------------------------------------------------------------------


BENCH = ["bench", "grid.yaml", "--data_dir", "data", "--threads", "1", "--output_dir"]


@pytest.mark.slow
def test_a_killed_bench_ends_with_the_table_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(changed(title="Test", methods=SMALL["methods"][:2])))
    unbroken = run_command(capsys, *BENCH, "whole")
    assert unbroken.code == 0, unbroken
    expected = json.loads((tmp_path / "whole/table.json").read_text())
    assert [len(row["scores"]) for row in expected["rows"]] == [2, 2]

    runs = tmp_path / "broken/runs"
    command = [sys.executable, "-m", "zotune", *BENCH, "broken", "--processes", "2"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (list(runs.glob("*/result.json")) and list(runs.glob("*mezo*/checkpoint-*"))):  # in the middle of a run
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    assert len(kept) < 5
    again = run_command(capsys, *BENCH, "broken")
    assert again.code == 0, again
    assert "runs are done already" in again.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # none of them was run again
    assert json.loads((tmp_path / "broken/table.json").read_text()) == expected
    assert len(list(runs.iterdir())) == 5
    assert not list(runs.glob("*/model.safetensors"))
    assert list(runs.glob("*/journal.zo"))  # a journal is enough to keep
    page = (tmp_path / "broken/report.html").read_text()
    assert page.count("<svg") == 2 and "src=" not in page


@pytest.mark.parametrize(("allowed", "processes", "threads"), [(None, 2, 2), ("1", 1, 1), ("8", 2, 2), ("", 4, 1), ("many", 1, 4)])
def test_threads_are_shared_out_within_what_is_allowed(monkeypatch, allowed, processes, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert runner.default_threads(processes) == threads
