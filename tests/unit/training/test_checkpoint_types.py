"""A checkpoint whose files are whole and hold other types than a run writes is refused in a sentence that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_cases import StopAt, choice_rows, trainer
from zotune.training.checkpoint import files, storage

RUN: dict[str, Any] = {"max_steps": 4, "train_dataset": choice_rows(20), "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
METHODS = {"forward": {"method": "lozo-m", "rank": 2, "interval": 10}, "backward": {"method": "fo-adamw"}}


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    for name, options in METHODS.items():
        with pytest.raises(KeyboardInterrupt):
            trainer(folder / name, callbacks=[StopAt(3)], **RUN, **options).train()
    return folder


def refused(name: str, run: Path, file: str) -> str:
    """The sentence with which a run does not resume."""
    saved = run / "checkpoint-2"
    storage.write_manifest(saved)
    with pytest.raises(ValueError) as caught:
        trainer(run, **RUN, **METHODS[name]).train(resume_from_checkpoint=str(saved))
    text = str(caught.value)
    assert file in text and "\n" not in text and len(text) < 1000, text
    return text


def changed(content: Any, path: str, value: Any) -> Any:
    """A copy of JSON with the entry at a path of dots set, or deleted where the value is DELETE."""
    copy = json.loads(json.dumps(content))
    *way, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    place = copy
    for word in way:
        place = place[word]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return copy


DELETE = object()
FILES: list[tuple[str, str, Any]] = [
    (files.STATE, "journal", 3),
    (files.STATE, "journal.bytes", "many"),
    (files.STATE, "journal.steps", None),
    (files.STATE, "since_log", []),
    (files.STATE, "since_log.steps", "2"),
    (files.STATE, "since_log.loss", None),
    (files.STATE, "weights", None),
    (files.STATE, "weights.dtypes", "float32"),
    (files.STATE, "training", {}),
    (files.STATE, "training.batch.examples", 1.5),
    (files.STATE, "optimizer", DELETE),
    (files.TRAINER_STATE, "global_step", "2"),
    (files.TRAINER_STATE, "global_step", -1),
    (files.TRAINER_STATE, "log_history", {}),
    (files.TRAINER_STATE, "epoch", [1]),
    (files.TRAINER_STATE, "best_metric", "high"),
    (files.TRAINER_STATE, "stateful_callbacks", {"TrainerControl": 3}),
    (files.TRAINER_STATE, "an entry", 1),
    (files.SCHEDULER, "type", 1),
    (files.SCHEDULER, "state", []),
    (files.RNG, "python.1", [1, 2]),
    (files.RNG, "python", {}),
    (files.RNG, "numpy.1", "keys"),
    (files.RNG, "torch", "zz"),
    (files.RNG, "torch", "00"),
]


def test_each_json_file_has_its_types(stopped_runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped_runs / "forward", tmp_path / "run"))
    saved = run / "checkpoint-2"
    for file, path, value in FILES:
        right = (saved / file).read_text()
        (saved / file).write_text(json.dumps(changed(json.loads(right), path, value)))
        storage.write_manifest(saved)
        fault = storage.problem(saved, run / "journal.zo")
        assert fault is not None and file in fault and "another checkpoint" in fault and "\n" not in fault, (file, path, fault)
        (saved / file).write_text(right)
    for file in (files.STATE, files.TRAINER_STATE, files.SCHEDULER, files.RNG, files.ARGUMENTS):
        right = (saved / file).read_text()
        (saved / file).write_text("[]")
        storage.write_manifest(saved)
        assert file in (storage.problem(saved, run / "journal.zo") or ""), file
        (saved / file).write_text(right)
    storage.write_manifest(saved)
    assert storage.problem(saved, run / "journal.zo") is None


@pytest.mark.parametrize(("path", "value"), [("state._last_lr", []), ("state.lr_lambdas", [3])])
def test_a_schedule_of_another_run_is_one_sentence(path: str, value: Any, stopped_runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped_runs / "forward", tmp_path / "run"))
    schedule = run / "checkpoint-2" / files.SCHEDULER
    schedule.write_text(json.dumps(changed(json.loads(schedule.read_text()), path, value)))
    refused("forward", run, files.SCHEDULER)


NUMBERS: dict[str, list[tuple[str, Any]]] = {
    "forward": [
        ("zotune", 4),
        ("zotune.steps", "2"),
        ("zotune.forward_passes", -1),
        ("zotune.prepared", 1),
        ("zotune.scales", [1.0, 2.0]),
        ("zotune.rule", []),
        ("zotune.transforms", None),
        ("zotune.general_path", [3]),
        ("zotune.options", []),
        ("param_groups.0.lr", "fast"),
        ("param_groups", {}),
    ],
    "backward": [
        ("baseline", 4),
        ("baseline.counts", ["1", 2, 3, 4, 5]),
        ("baseline.counts", [1]),
        ("baseline.plain", {"nothing": {"a": 1}}),
        ("baseline.names", 3),
        ("param_groups.0.lr", "fast"),
        ("param_groups", {}),
    ],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_other_types_is_refused(name: str, stopped_runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped_runs / name, tmp_path / name))
    path = run / "checkpoint-2" / files.STATE
    right = path.read_text()
    for place, value in NUMBERS[name]:
        path.write_text(json.dumps(changed(json.loads(right), f"optimizer.{place}", value)))
        refused(name, run, files.STATE)
    path.write_text(right)
    schedule = run / "checkpoint-2" / files.SCHEDULER
    schedule.write_text(json.dumps(changed(json.loads(schedule.read_text()), "state.last_epoch", "2")))
    refused(name, run, files.SCHEDULER)


TENSORS: list[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = [
    lambda tensors: {},
    lambda tensors: {name: tensor[..., :1].contiguous() if tensor.dim() else tensor for name, tensor in tensors.items()},
    lambda tensors: {name: tensor.to(torch.float64) for name, tensor in tensors.items()},
    lambda tensors: {**tensors, "of/nothing": torch.zeros(1)},
    lambda tensors: {f"{name}x": tensor for name, tensor in tensors.items()},
]


@pytest.mark.parametrize("name", METHODS)
def test_tensors_of_another_shape_or_dtype_are_refused(name: str, stopped_runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped_runs / name, tmp_path / name))
    path = run / "checkpoint-2" / files.STATE_TENSORS
    right = load_file(path)
    assert right
    for number, change in enumerate(TENSORS):
        save_file(change(right), path)
        try:
            refused(name, run, files.STATE)
        except BaseException as error:
            raise AssertionError(f"tensors {number}") from error
    save_file(right, path)
    storage.write_manifest(path.parent)
    assert trainer(run, **RUN, **METHODS[name]).train(resume_from_checkpoint=True).global_step == 4
