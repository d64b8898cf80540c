"""Checkpoint folders: safetensors and JSON only, complete or absent."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

import paths
from trainer_cases import StopAt, choice_rows, same_weights, tiny_llama, trainer, weights
from zotune import ZerothOrder
from zotune.training import run_folder
from zotune.training.checkpoint import contents, storage


@pytest.mark.parametrize("method", ["mezo-adam", "lozo-m"])
def test_a_run_folder_holds_no_pickle(method: str, tmp_path: Path, tiny_lm: Path) -> None:
    run = trainer(tmp_path, method=method, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
                  eval_dataset=choice_rows(), load_best_model_at_end=True,
                  processing_class=AutoTokenizer.from_pretrained(tiny_lm))  # fmt: skip
    run.train()
    run.save_model()
    run.save_state()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "journal.zo",
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        contents.STATE,
        contents.STATE_TENSORS,
        contents.SCHEDULER,
        contents.RNG,
        storage.TRAINER_STATE,
        storage.ARGUMENTS,
    }
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as content:
                content.keys()
        else:
            assert path.suffix == ".zo" or path.suffix == ".jinja", path


def test_a_checkpoint_loads_by_from_pretrained(tmp_path: Path, tiny_lm: Path) -> None:
    run = trainer(tmp_path, method="lozo", save_strategy="steps", save_steps=6,
                  processing_class=AutoTokenizer.from_pretrained(tiny_lm))  # fmt: skip
    run.train()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert same_weights(weights(loaded), weights(run.model))
    saved, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "checkpoint-6", tiny_lm))
    assert saved("a film") == original("a film")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    with pytest.raises(OSError, match="disk full"), storage.draft(final) as folder:
        (folder / "weights").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with storage.draft(final) as folder:
        (folder / "weights").write_text("first")
        assert not final.exists()
    with storage.draft(final) as folder:
        (folder / "weights").write_text("second")
        assert (final / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (final / "weights").read_text() == "second"


def test_a_save_that_fails_leaves_the_run_resumable(tmp_path: Path) -> None:
    class FullDisk:
        """A tokenizer that can be saved three times."""

        saves = 0

        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")
            FullDisk.saves += 1
            if FullDisk.saves > 3:
                raise OSError("disk full")

    run = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 0}
    with pytest.raises(OSError, match="disk full"):
        trainer(tmp_path / "run", processing_class=FullDisk(), **run).train()
    kept = [folder.name for folder in storage.checkpoints(tmp_path / "run")]
    assert kept == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    assert not list((tmp_path / "run").glob(".*"))
    resumed = trainer(tmp_path / "run", **run)
    resumed.train(resume_from_checkpoint=True)
    straight = trainer(tmp_path / "straight", max_steps=6)
    straight.train()
    assert same_weights(weights(resumed.model), weights(straight.model))


@pytest.mark.slow
def test_a_process_killed_in_a_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from trainer_cases import trainer

        class Killed:
            def save_pretrained(self, folder):
                (Path(folder) / "tokenizer.json").write_text("{}")
                if "checkpoint-4" in str(folder):
                    os.kill(os.getpid(), signal.SIGKILL)

        trainer(Path(sys.argv[1]), processing_class=Killed(), save_strategy="steps", save_steps=2).train()
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run"), str(paths.HELPERS)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert names == {"checkpoint-2", ".checkpoint-4.partial"}
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    straight = trainer(tmp_path / "straight")
    straight.train()
    assert same_weights(weights(resumed.model), weights(straight.model))
    assert not list((tmp_path / "run").glob(".*"))


def test_generator_states_come_back(tmp_path: Path) -> None:
    contents.save_rng(tmp_path)
    first = torch.rand(3), np.random.rand(3), np.random.randn(), random.random()
    contents.load_rng(tmp_path)
    second = torch.rand(3), np.random.rand(3), np.random.randn(), random.random()
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all() and first[2:] == second[2:]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=7),
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.7, total_steps=9, cycle_momentum=False),
    ],
)
def test_schedules_go_on(make: partial, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = ZerothOrder(model, "mezo", lr=0.3)
    scheduler = make(optimizer)
    for _ in range(3):
        optimizer.step(lambda: model.weight.sum())
        scheduler.step()
    contents.save_scheduler(tmp_path, scheduler)
    contents.save_optimizer(tmp_path, optimizer, journal=None)

    again = torch.nn.Linear(2, 2)
    other = ZerothOrder(again, "mezo", lr=0.3)
    schedule = make(other)
    assert contents.load_optimizer(tmp_path, other) == {"journal": None}
    contents.load_scheduler(tmp_path, schedule)
    for _ in range(4):
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for o, m, s in ((optimizer, model, scheduler), (other, again, schedule)):
            o.step(lambda m=m: m.weight.sum())
            s.step()


def test_a_schedule_that_is_not_plain_data_is_refused(tmp_path: Path) -> None:
    class Odd(torch.optim.lr_scheduler.LambdaLR):
        def state_dict(self) -> dict:
            return {"when": object()}

    optimizer = ZerothOrder(torch.nn.Linear(2, 2), "mezo")
    with pytest.raises(ValueError, match="the state of Odd cannot be written as JSON"):
        contents.save_scheduler(tmp_path, Odd(optimizer, lambda step: 1.0))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, r"earlier version of zotune \(format 3; this one reads 4\): use that version, or start a new run in another output_dir"),
        (None, "earlier version of zotune"),
        (5, r"later version of zotune \(format 5; this one reads 4\): upgrade zotune"),
    ],
)
def test_folders_of_another_format_are_refused(version: int | None, message: str, tmp_path: Path) -> None:
    run = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(3)], **run).train()
    saved = tmp_path / "checkpoint-2"
    for path in (saved / storage.MANIFEST, saved / storage.STATE):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": version}))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tiny_llama(), **run).train(resume_from_checkpoint=str(saved))
    with pytest.raises(ValueError, match=message):
        contents.load_optimizer(saved, ZerothOrder(torch.nn.Linear(2, 2), "mezo"))
    (tmp_path / run_folder.RUN_FILE).write_text(json.dumps({"format": version, "command": "zotune train"}))
    with pytest.raises(ValueError, match=message):
        run_folder.read_run(tmp_path)


def test_damaged_json_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    run = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(3)], **run).train()
    (tmp_path / "checkpoint-2" / contents.SCHEDULER).write_text('{"type": "Lam')
    with pytest.raises(ValueError, match=r"checkpoint-2/scheduler.json is damaged"):
        trainer(tmp_path, tiny_llama(), **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
