"""Options that differ from the run's are refused, or allowed and recorded, by a table of all; from a checkpoint as from a journal."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import zotune
from trainer_cases import StopAt, choice_rows, journal_of, tiny_llama, trainer
from zotune.training import resume_rules
from zotune.training.arguments import DataArguments, ModelArguments, OutputArguments
from zotune.training.resume_rules import OPTIONS, RULES, Batch, Rule, micro_batch
from zotune.training.schemes import Scheme

KINDS = (zotune.ZOConfig, ModelArguments, DataArguments, OutputArguments, Scheme)
FIELDS = [field.name for kind in KINDS for field in dataclasses.fields(kind)]
PAGE = Path(__file__).parents[3] / "docs/reference/resuming.md"
RUN: dict[str, Any] = {"max_steps": 4, "train_dataset": choice_rows(40), "logging_steps": 1}


def test_every_option_has_one_rule() -> None:
    assert sorted(name for names in OPTIONS.values() for name in names.split()) == sorted(FIELDS)


def test_the_table_of_the_documents_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", PAGE.read_text(), re.M)[1:]
    found = {rule: re.findall(r"`(\w+)`", names) for rule, names in rows}
    assert found == {rule.value: names.split() for rule, names in OPTIONS.items()}


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs stopped at step 3: zeroth order with a checkpoint at 2, without one, and of first order."""
    folder = tmp_path_factory.mktemp("stopped")
    saving = {"save_strategy": "steps", "save_steps": 2}
    for name, options in {"saved": saving, "unsaved": {}, "backward": {**saving, "method": "fo-adamw"}}.items():
        with pytest.raises(KeyboardInterrupt):
            trainer(folder / name, callbacks=[StopAt(3)], **RUN, **options).train()
    return folder


CHANGED: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "seed": 4,
    "data_seed": 5,
    "train_sampling_strategy": "random",
    "dataloader_drop_last": True,
    "label_smoothing_factor": 0.1,
    "eps": 1e-2,
    "rank": 3,
    "method": "mezo",
    "train_dataset": choice_rows(41),
    "objective": "choices",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize("run", ["saved", "unsaved", "backward"])
def test_what_determines_a_run_cannot_change(run: str, stopped_runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped_runs / run, tmp_path / run))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, value in CHANGED.items():
        if run == "backward" and name in ("eps", "rank"):
            continue
        options = {**RUN, **({"method": "fo-adamw"} if run == "backward" else {}), name: value}
        found = re.escape(name) if "per_device" not in name and "accumulation" not in name else "a step of the run takes 16 examples"
        with pytest.raises(ValueError, match=rf"{run}.*{found}"):
            trainer(folder, **options).train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_message_names_both_values(stopped_runs: Path) -> None:
    message = r"cannot be resumed with other options: learning_rate was 0.01 and is 0.001; weight_decay was 0.0 and is 0.5\. Resume with"
    with pytest.raises(ValueError, match=message):
        trainer(stopped_runs / "saved", **RUN, learning_rate=1e-3, weight_decay=0.5).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("run", ["saved", "unsaved"])
def test_the_batch_may_be_cut_otherwise(run: str, stopped_runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped_runs / run, tmp_path / run))
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    again = trainer(folder, tiny_llama(), **RUN, **cut, max_nonfinite_steps=3, logging_first_step=True)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and len(journal_of(folder)) == 4
    assert journal_of(folder).header["training"]["batch"] == {"per_device": 16, "accumulation": 1, "examples": 16}


def test_a_batch_stays_with_any_number_of_processes() -> None:
    place, then = Path("run"), Batch(8, 2, 32)  # of two processes
    assert micro_batch(place, then, Batch(8, 2, 16), 1) == micro_batch(place, then, Batch(16, 2, 32), 1) == 16
    assert micro_batch(place, then, Batch(4, 4, 32), 2) == 8
    with pytest.raises(ValueError, match="takes 32 examples"):
        micro_batch(place, then, Batch(4, 2, 8), 1)


def test_rules_are_sentences_of_their_own() -> None:
    assert RULES["learning_rate"] is Rule.EQUAL and RULES["max_steps"] is Rule.FREE
    assert resume_rules.differing({"max_steps": 3, "seed": 1}, {"max_steps": 4, "seed": 1, "rank": 2}, Rule.FREE) == {"max_steps": (3, 4)}
