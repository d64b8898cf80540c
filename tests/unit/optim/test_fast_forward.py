"""A resumed run goes through what its journal holds beyond the checkpoint without evaluating anything, and ends as the unbroken run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import zotune
from trainer_cases import StopAt, choice_rows, losses, same_weights, tiny_llama, trainer, weights
from zotune.optim.journal_records import StepRecord
from zotune.optim.resume import usable
from zotune.training.checkpoint import storage

RUN: dict[str, Any] = {
    "max_steps": 12,
    "logging_steps": 4,
    "train_dataset": choice_rows(40),
    "method": "lozo-m",
    "interval": 5,
    "forward_batching": "batched",  # whatever a busy machine would find faster
}
SAVING = {**RUN, "save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[zotune.ZOTrainer, bytes]:
    folder = tmp_path_factory.mktemp("straight")
    run = trainer(folder, **RUN)
    run.train()
    return run, (folder / "journal.zo").read_bytes()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after step 10, with checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[StopAt(10)], **SAVING).train()
    return folder


def check_goes_on(folder: Path, straight: tuple[zotune.ZOTrainer, bytes]) -> None:
    run = trainer(folder, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight[0].model), weights(run.model))
    assert (folder / "journal.zo").read_bytes() == straight[1]
    assert losses(straight[0])[-1] == losses(run)[-1]
    assert run.zo_optimizer.forward_passes == straight[0].zo_optimizer.forward_passes
    assert run.zo_optimizer.sequences_evaluated == straight[0].zo_optimizer.sequences_evaluated


# -- the journal's tail


@pytest.mark.parametrize("options", [{}, {"learning_rate": "auto", "eps": "auto"}, {"method": "lozo-e", "eps": "auto"}], ids=str)
def test_steps_after_a_checkpoint_are_taken_from_the_journal(options: dict[str, Any], tmp_path: Path) -> None:
    """Without evaluating anything; with measured rates a run goes on from what was measured last in full."""
    whole = trainer(tmp_path / "a", **{**RUN, **options})
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", callbacks=[StopAt(10)], **{**SAVING, **options}).train()
    calls: list[int] = []

    class Counting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(len(run.zo_optimizer.tail))

    run = trainer(tmp_path / "b", callbacks=[Counting()], **{**SAVING, **options})
    run.train(resume_from_checkpoint=True)
    followed = 0 if options.get("learning_rate") == "auto" else 2  # the journal ends at 10, the checkpoint is of step 8
    assert [bool(left) for left in calls] == [True] * (followed - 1) + [False] * (4 - max(followed - 1, 0))
    assert same_weights(weights(whole.model), weights(run.model))
    assert (tmp_path / "a/journal.zo").read_bytes() == (tmp_path / "b/journal.zo").read_bytes()
    assert run.zo_optimizer.sequences_evaluated == whole.zo_optimizer.sequences_evaluated


def test_without_any_checkpoint_the_journal_is_enough(straight: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(10)], **RUN).train()
    assert not storage.checkpoints(tmp_path)
    check_goes_on(tmp_path, straight)


def test_the_journal_alone_needs_the_base_weights(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(3)], **RUN).train()
    with pytest.raises(ValueError, match="began from other weights than these"):
        trainer(tmp_path, tiny_llama(seed=99), **RUN).train(resume_from_checkpoint=True)


# -- damage


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :])


def test_without_a_sound_checkpoint_the_journal_restores_the_run(stopped: Path, straight: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    for number in (4, 8):
        spoil(folder / f"checkpoint-{number}" / "model.safetensors")
    check_goes_on(folder, straight)


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_torn_journal_goes_on_from_what_is_whole(cut: int, stopped: Path, straight: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    content = (folder / "journal.zo").read_bytes()
    (folder / "journal.zo").write_bytes(content[:-cut])
    check_goes_on(folder, straight)


def test_fast_forward_ends_with_a_step_or_complete_measurements() -> None:
    step, event, kept = StepRecord(0, (1.0,), 0.0, (1.0,), (False,)), {"event": "measured"}, {"event": "measured", "state": {}}
    assert usable([event, step, event], measured=False) == 2
    assert usable([kept, step, event, step], measured=True) == 1
    assert usable([event], measured=False) == usable([step, event], measured=True) == 0
