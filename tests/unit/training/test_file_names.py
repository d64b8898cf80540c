"""Names of files that a file gives lead to files beside it and nowhere else; weights that fit nothing are an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_cases import StopAt, accuracy, choice_rows, tiny_llama, trainer
from zotune.io.inside import indexed_files, inside, is_inside
from zotune.training.adapters import check_fit
from zotune.training.checkpoint import storage
from zotune.training.schemes import apply, load_adapter

OUTSIDE = ["../model.safetensors", "/etc/passwd", "a/../../b", "~/x", "..\\x", "C:\\x", "", None, 3, "a\0b"]
RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "method": "mezo"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_none(name: Any, tmp_path: Path) -> None:
    assert not is_inside(name)
    with pytest.raises(ValueError, match="outside of the folder"):
        inside(tmp_path, name, tmp_path / "index.json")


def test_names_within_the_folder_are_taken(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.safetensors", tmp_path / "i") == tmp_path / "a/b.safetensors"
    (tmp_path / "i").write_text(json.dumps({"weight_map": {"x": "b", "y": "a", "z": "b"}}))
    assert indexed_files(tmp_path / "i") == [tmp_path / "a", tmp_path / "b"]


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    options = {**RUN, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 0}
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, eval_dataset=choice_rows(), compute_metrics=accuracy, callbacks=[StopAt(3)], **options).train()
    return folder


@pytest.mark.parametrize("where", ["../away.safetensors", "absolute", "a link", "nothing"])
def test_an_index_of_a_checkpoint_names_its_own_files(where: str, stopped_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped_run, tmp_path / "run"))
    saved = run / "checkpoint-2"
    (saved / "model.safetensors").rename(run / "away.safetensors")
    name = {"absolute": str(run / "away.safetensors"), "a link": "link", "nothing": "absent"}.get(where, where)
    if where == "a link":
        (saved / name).symlink_to(run / "away.safetensors")
    weights = load_file(run / "away.safetensors")
    (saved / storage.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    storage.write_manifest(saved)
    with pytest.raises(ValueError, match=r"names .* which (is outside of the folder|.* does not have).*another checkpoint"):
        trainer(run, **RUN).train(resume_from_checkpoint=str(saved))


def test_the_best_checkpoint_is_one_of_the_run_itself(stopped_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped_run, tmp_path / "run"))
    saved = run / "checkpoint-2"
    away = Path(shutil.copytree(saved, tmp_path / "checkpoint-2"))
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in load_file(away / "model.safetensors").items()}, away / "model.safetensors"
    )
    state = json.loads((saved / storage.TRAINER_STATE).read_text())
    (saved / storage.TRAINER_STATE).write_text(json.dumps({**state, "best_model_checkpoint": str(away), "best_metric": -1.0}))
    storage.write_manifest(saved)
    options = {**RUN, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 0}
    again = trainer(run, tiny_llama(seed=9), eval_dataset=choice_rows(), compute_metrics=accuracy, **options)
    again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint) == saved
    assert again.model.lm_head.weight.abs().sum() > 0


def test_an_adapter_whose_weights_fit_nothing_is_refused(tmp_path: Path) -> None:
    apply(tiny_llama(), "lora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    right = load_file(path)
    load_adapter(tiny_llama(), tmp_path)
    some = {name: tensor for name, tensor in right.items() if "layers.1." not in name}
    renamed = {name.replace("q_proj", "qq_proj"): tensor for name, tensor in right.items()}
    for wrong, message in ((some, "it lacks 4 of the 8 weights"), (renamed, "lacks 4 .* and it holds 4"), ({}, "it lacks all")):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=rf"does not fit the model: .*{message}"):
            load_adapter(tiny_llama(), tmp_path)


def test_an_adapter_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, apply(tiny_llama(), "lora"), callbacks=[StopAt(3)], **RUN).train()
    path = tmp_path / "checkpoint-2/adapter_model.safetensors"
    check_fit(apply(tiny_llama(), "lora"), path.parent)
    save_file(dict(list(load_file(path).items())[1:]), path)
    storage.write_manifest(path.parent)
    with pytest.raises(ValueError, match="lacks 1 of the 8"):
        trainer(tmp_path, apply(tiny_llama(), "lora"), **RUN).train(resume_from_checkpoint=True)
