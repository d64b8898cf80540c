"""A run that is cut off and resumed is the run that was not: weights, journal and logged losses, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import zotune
from trainer_cases import (
    StopAt,
    accuracy,
    choice_rows,
    collate_choices,
    journal_of,
    labelled_rows,
    losses,
    same_weights,
    tiny_llama,
    trainer,
    weights,
)
from zotune.training.checkpoint import contents as checkpoint
from zotune.training.checkpoint import storage

# 20 steps of 3 batches an epoch; the checkpoint at 7 falls within an epoch, a logging interval and a redraw interval.
RUN: dict[str, Any] = {
    "max_steps": 20,
    "logging_steps": 5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "train_dataset": choice_rows(40),
}
INTERRUPTED = {**RUN, "save_strategy": "steps", "save_steps": 7}


def method_options(method: str) -> dict[str, Any]:
    options = zotune.methods.options(method)
    anchored = {"method_args": {"anchor_batches": 2, "anchor_ratio": 1.0}} if "anchor_batches" in options else {}
    return {"method": method, **({"interval": 4} if "interval" in options else {}), **anchored}


def interrupted_then_resumed(folder: Path, stop: int = 9, **options: Any) -> zotune.ZOTrainer:
    dtype = options.pop("dtype", torch.float32)
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, tiny_llama(dtype=dtype), callbacks=[StopAt(stop)], **INTERRUPTED, **options).train()
    again = trainer(folder, tiny_llama(seed=99, dtype=dtype), **INTERRUPTED, **options)
    again.train(resume_from_checkpoint=True)
    return again


#: One for each kind of state there is: none, rule's, subspace's, both, numbers, past coefficients, bytes, an anchor.
STATES = ["mezo", "mezo-adam", "lozo-e", "lozo-m", "meazo", "replayed-adam", "zo-jaguar", "mezo-svrg"]


@pytest.mark.parametrize("method", STATES)
def test_resumed_run_equals_straight_run(method: str, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", **RUN, **method_options(method))
    straight.train()
    saving = trainer(tmp_path / "saving", **INTERRUPTED, **method_options(method))
    saving.train()
    resumed = interrupted_then_resumed(tmp_path / "resumed", **method_options(method))

    for other in (saving, resumed):
        assert same_weights(weights(straight.model), weights(other.model))
        assert losses(straight) == losses(other)
    contents = {(tmp_path / name / "journal.zo").read_bytes() for name in ("straight", "saving", "resumed")}
    assert len(contents) == 1


@pytest.mark.parametrize("method", ["mezo", "mezo-adam", "lozo", "lozo-m"])
def test_resumed_run_equals_straight_run_in_bfloat16(method: str, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", tiny_llama(dtype=torch.bfloat16), **RUN, **method_options(method))
    straight.train()
    resumed = interrupted_then_resumed(tmp_path / "resumed", dtype=torch.bfloat16, **method_options(method))
    assert same_weights(weights(straight.model), weights(resumed.model))
    assert losses(straight) == losses(resumed)


def test_a_resumed_run_with_accumulation_equals_the_straight_run(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, **method_options("lozo-m")}
    run = {**RUN, "train_dataset": labelled_rows(40), "data_collator": None, **options}
    straight = trainer(tmp_path / "straight", **run)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "resumed", callbacks=[StopAt(9)], **{**INTERRUPTED, **run}).train()
    resumed = trainer(tmp_path / "resumed", tiny_llama(seed=99), **{**INTERRUPTED, **run})
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model))
    assert losses(straight) == losses(resumed)
    assert (tmp_path / "straight/journal.zo").read_bytes() == (tmp_path / "resumed/journal.zo").read_bytes()


def test_a_plateau_schedule_and_the_best_metric_go_on(tmp_path: Path) -> None:
    run = {
        **RUN,
        "eval_dataset": choice_rows(),
        "compute_metrics": accuracy,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "warmup_steps": 0,
        "metric_for_best_model": "accuracy",
        "save_strategy": "steps",
        "save_steps": 7,
        "save_total_limit": 0,
    }
    straight = trainer(tmp_path / "straight", **run)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "resumed", callbacks=[StopAt(9)], **run).train()
    resumed = trainer(tmp_path / "resumed", **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed/checkpoint-7"))
    rates = [record.lrs for record in journal_of(tmp_path / "resumed").records()]
    assert len(set(rates)) > 2
    assert rates == [record.lrs for record in journal_of(tmp_path / "straight").records()]
    assert resumed.state.best_metric == straight.state.best_metric
    assert resumed.state.best_global_step == straight.state.best_global_step


def test_the_journal_is_cut_back_to_a_checkpoint_that_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(9)], **INTERRUPTED).train()
    assert len(journal_of(tmp_path)) == 9
    with pytest.raises(KeyboardInterrupt):
        run = trainer(tmp_path, callbacks=[StopAt(8)], **INTERRUPTED)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert len(journal_of(tmp_path)) == 8


def test_the_journal_replays_to_the_trained_weights(tmp_path: Path) -> None:
    resumed = interrupted_then_resumed(tmp_path, **method_options("lozo-m"))
    base = tiny_llama()
    zotune.replay(base, tmp_path / "journal.zo").remove_hooks()
    assert same_weights(weights(base), weights(resumed.model))


def test_a_checkpoint_beyond_the_journals_end_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(15)], **INTERRUPTED).train()
    with pytest.raises(KeyboardInterrupt):
        run = trainer(tmp_path, callbacks=[StopAt(8)], **INTERRUPTED)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    resumed = trainer(tmp_path, **INTERRUPTED)
    with pytest.raises(ValueError, match=r"ends before step 14 .* earlier checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    resumed.train(resume_from_checkpoint=True)
    straight = trainer(tmp_path / "straight", **RUN)
    straight.train()
    assert same_weights(weights(straight.model), weights(resumed.model))


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 9, with a checkpoint at 7."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[StopAt(9)], **INTERRUPTED).train()
    return folder


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


@pytest.mark.parametrize(
    "name",
    [checkpoint.SCHEDULER, checkpoint.RNG, checkpoint.STATE, checkpoint.STATE_TENSORS, storage.TRAINER_STATE],
)
def test_a_file_missing_from_a_checkpoint_is_named(stopped: Path, name: str) -> None:
    (stopped / "checkpoint-7" / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}.*resume from another checkpoint"):
        trainer(stopped, **INTERRUPTED).train(resume_from_checkpoint=str(stopped / "checkpoint-7"))


def test_a_checkpoint_without_weights_is_an_error(stopped: Path) -> None:
    (stopped / "checkpoint-7/model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        trainer(stopped, **INTERRUPTED).train(resume_from_checkpoint=str(stopped / "checkpoint-7"))


def test_a_missing_journal_is_an_error(stopped: Path) -> None:
    (stopped / "journal.zo").unlink()
    with pytest.raises(ValueError, match="set output_dir to the folder of that run"):
        trainer(stopped, **INTERRUPTED).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_run_is_an_error(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "other", callbacks=[StopAt(9)], **{**INTERRUPTED, "seed": 4}).train()
    with pytest.raises(ValueError, match="written by another run"):
        run = trainer(tmp_path / "other", **INTERRUPTED)
        run.train(resume_from_checkpoint=str(stopped / "checkpoint-7"))


@pytest.mark.parametrize("changed", [{"rank": 1}, {"eps": 1e-2}, {"method": "mezo"}, {"seed": 11}])
def test_another_method_or_seed_cannot_take_a_run_over(stopped: Path, changed: dict[str, Any]) -> None:
    before = (stopped / "journal.zo").read_bytes()
    with pytest.raises(ValueError, match="cannot be resumed with other options: "):
        trainer(stopped, **{**INTERRUPTED, **changed}).train(resume_from_checkpoint=True)
    assert (stopped / "journal.zo").read_bytes() == before


def test_weights_of_another_model_are_an_error(stopped: Path) -> None:
    small = tiny_llama()
    small.model.layers.append(tiny_llama(5).model.layers[0])
    with pytest.raises(ValueError, match="does not fit the model"):
        trainer(stopped, small, **INTERRUPTED).train(resume_from_checkpoint=True)


def test_another_scheduler_is_an_error(stopped: Path) -> None:
    changed = {**INTERRUPTED, "lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0, "eval_strategy": "steps"}
    with pytest.raises(ValueError, match="lr_scheduler_type was 'linear' and is 'reduce_lr_on_plateau'"):
        trainer(stopped, eval_dataset=choice_rows(), **changed).train(resume_from_checkpoint=True)


def test_nothing_to_resume_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_weights_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3, save_only_model=True).train()
    with pytest.raises(ValueError, match="save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_folder_that_holds_a_run_is_not_trained_into(stopped: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"already holds a run: continue it with resume_from_checkpoint=True, or .*"):
        trainer(stopped, **INTERRUPTED).train()
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_what_a_killed_save_left_behind_is_removed(stopped: Path) -> None:
    draft = stopped / ".checkpoint-14.partial"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half a file")
    trainer(stopped, **INTERRUPTED).train(resume_from_checkpoint=True)
    assert not list(stopped.glob(".*"))
    assert json.loads((stopped / "checkpoint-14" / checkpoint.STATE).read_text())["journal"]["steps"] == 14


def test_the_same_trainer_resumes_too(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", **RUN)
    straight.train()
    stop = StopAt(9)
    run = trainer(tmp_path / "run", callbacks=[stop], **INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(stop)
    run.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(run.model))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    run.train()
    before = (tmp_path / "journal.zo").read_bytes()
    again = trainer(tmp_path, tiny_llama(seed=99), max_steps=6, save_strategy="steps", save_steps=3)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert same_weights(weights(again.model), weights(run.model))
    assert (tmp_path / "journal.zo").read_bytes() == before


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", max_steps=9)
    straight.train()
    trainer(tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=6).train()
    longer = trainer(tmp_path / "run", tiny_llama(seed=99), max_steps=9)
    longer.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(longer.model))


def test_an_optimizer_of_ones_own_resumes_with_its_own_journal(tmp_path: Path) -> None:
    def own(folder: str, journal: Any, **options: Any) -> zotune.ZOTrainer:
        model = tiny_llama()
        optimizer = zotune.ZerothOrder(model, "lozo", lr=1e-2, journal=journal)
        return trainer(tmp_path / folder, model, optimizers=(optimizer, None), **options)

    straight = own("straight", None, **RUN)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        own("run", tmp_path / "elsewhere.zo", callbacks=[StopAt(9)], **INTERRUPTED).train()
    assert not (tmp_path / "run/journal.zo").exists()
    resumed = own("run", zotune.Journal.open(tmp_path / "elsewhere.zo"), **INTERRUPTED)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model))
    records = [list(zotune.Journal.open(tmp_path / name).records()) for name in ("straight/journal.zo", "elsewhere.zo")]
    assert records[0] == records[1]


def test_a_used_optimizer_starts_no_run(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = zotune.ZerothOrder(model, "mezo")
    optimizer.step(lambda: model.lm_head.weight.sum())
    with pytest.raises(ValueError, match="has already taken 1 steps"):
        trainer(tmp_path, model, optimizers=(optimizer, None)).train()
    assert not (tmp_path / "journal.zo").exists()


def test_a_bare_module_resumes(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(100, 16)
            self.head = torch.nn.Linear(16, 100, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.head(self.embed(input_ids).mean(dim=1))

    def objective(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["input_ids"]), batch["answer"], reduction="none")

    def net() -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Net()

    shared = {"objective": objective, "data_collator": collate_choices, **method_options("lozo")}
    straight = trainer(tmp_path / "straight", net(), **RUN, **shared)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", net(), callbacks=[StopAt(9)], **INTERRUPTED, **shared).train()
    resumed = trainer(tmp_path / "run", net(), **INTERRUPTED, **shared)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model))


@pytest.mark.parametrize("method", ["mezo", "lozo"])
def test_a_resumed_run_decays_toward_the_weights_it_began_with(method: str, tmp_path: Path) -> None:
    """θ₀ is in no checkpoint: it is the model that the trainer is given, before the checkpoint is loaded into it."""
    options = {"method": method, "anchor_decay": 3.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    options |= {"eval_steps": 4, "eval_dataset": choice_rows(8)}
    straight = trainer(tmp_path / "straight", **options)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "halted", callbacks=[StopAt(3)], **options).train()
    resumed = trainer(tmp_path / "halted", **options)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model))
    drifts = [[entry["drift"] for entry in each.state.log_history if "drift" in entry] for each in (straight, resumed)]
    assert drifts[0] == drifts[1] and len(drifts[0]) == 1 and drifts[0][0] > 0
