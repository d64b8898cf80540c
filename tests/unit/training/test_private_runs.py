"""Private runs of the trainer and of `zotune train`: what they write, how they resume, what they refuse."""

from __future__ import annotations

import json
import math
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from command_cases import run_command, weights_digest
from trainer_cases import (
    StopAt,
    accuracy,
    choice_rows,
    collate_choices,
    config,
    journal_of,
    labelled_rows,
    same_weights,
    tiny_llama,
    trainer,
    weights,
)
from zotune.optim.journal_records import StepRecord
from zotune.training.private_runs import public_batch, read_key

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")

PRIVATE: dict[str, Any] = {
    "method": "lozo",
    "eps": 1e-2,
    "dp_noise_multiplier": 2.0,
    "dp_clip": 100.0,
    "dp_delta": 1e-4,
    "max_steps": 6,
    "logging_steps": 2,
    "eval_dataset": choice_rows(8),
    "compute_metrics": accuracy,
    "save_strategy": "steps",
    "save_steps": 2,
}
KEY = "_private/noise.key"


def steps_of(folder: Path) -> list[StepRecord]:
    return [record for record in journal_of(folder).records() if isinstance(record, StepRecord)]


def test_a_run_writes_no_loss_and_its_key_for_the_owner_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path / "a", **PRIVATE)
    result = run.train()
    assert math.isnan(result.training_loss) and "train_loss" not in result.metrics
    entries = run.state.log_history
    assert not [name for entry in entries for name in entry if name in ("loss", "loss_diff", "skipped_steps", "seconds", "total_flos")]
    assert [entry["step"] for entry in entries if "epsilon" in entry] == [2, 4, 6]
    assert all(math.isnan(record.loss) and not any(record.skipped) for record in steps_of(tmp_path / "a"))
    assert stat.S_IMODE((tmp_path / "a" / KEY).stat().st_mode) == 0o600
    key = (tmp_path / "a" / KEY).read_text().strip()
    others = [path for path in (tmp_path / "a").rglob("*") if path.is_file() and path.name != "noise.key"]
    assert not [path for path in others if key.encode() in path.read_bytes() or bytes.fromhex(key) in path.read_bytes()]
    again = trainer(tmp_path / "b", **PRIVATE)
    again.train()
    assert [record.coefficients for record in steps_of(tmp_path / "b")] != [record.coefficients for record in steps_of(tmp_path / "a")]
    assert run.spent()["epsilon"] == again.spent()["epsilon"] > 0


def test_a_run_resumes_exactly_with_its_key_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[StopAt(3)], **PRIVATE).train()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    keyless = Path(shutil.copytree(folder, tmp_path / "keyless"))
    ends = []
    for place in (folder, copy):
        again = trainer(place, tiny_llama(seed=9), **PRIVATE)
        again.train(resume_from_checkpoint=True)
        ends.append((weights(again.model), steps_of(place)))
    assert same_weights(ends[0][0], ends[1][0])
    assert [r.coefficients for r in ends[0][1]] == [r.coefficients for r in ends[1][1]] and len(ends[0][1]) == 6
    with pytest.raises(ValueError, match="spent twice"):
        trainer(keyless, **PRIVATE).train(resume_from_checkpoint=str(keyless / "checkpoint-2"))
    (keyless / KEY).write_text("00" * 32)
    with pytest.raises(ValueError, match="the key is not that of the saved run"):
        trainer(keyless, **PRIVATE).train(resume_from_checkpoint=True)
    (keyless / KEY).write_text("no key")
    with pytest.raises(ValueError, match="does not hold a key"):
        trainer(keyless, **PRIVATE).train(resume_from_checkpoint=True)
    (keyless / KEY).unlink()
    with pytest.raises(ValueError, match="the key of this private run"):
        trainer(keyless, **PRIVATE).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="dp_noise_multiplier was 2"):
        trainer(keyless, **{name: value for name, value in PRIVATE.items() if not name.startswith("dp_")}).train(
            resume_from_checkpoint=True
        )
    assert len(steps_of(keyless)) == 3


def test_a_run_spends_no_more_than_its_epsilon(tmp_path: Path) -> None:
    bounded = {**PRIVATE, "dp_noise_multiplier": None, "dp_epsilon": 3.0, "max_steps": 3}
    run = trainer(tmp_path, **bounded)
    run.train()
    assert 2.9 < run.spent()["epsilon"] <= 3.0
    with pytest.raises(ValueError, match="the noise of this run was made for fewer steps: 6 of them would spend"):
        trainer(tmp_path, **{**bounded, "max_steps": 6}).train(resume_from_checkpoint=True)


def test_a_model_that_computes_its_own_loss_is_trained(tmp_path: Path) -> None:
    options = {**PRIVATE, "train_dataset": labelled_rows(), "data_collator": None, "eval_dataset": None, "compute_metrics": None}
    run = trainer(tmp_path, **{**options, "max_steps": 1, "gradient_accumulation_steps": 2})
    run.train()
    assert run.spent()["batch_size"] == 32 and len(steps_of(tmp_path)) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"dp_epsilon": 1.0}, "give one of them"),
    "no clip": ({"dp_clip": None}, "needs dp_clip"),
    "clip": ({"dp_clip": -1.0}, "dp_clip must be a positive number"),
    "delta": ({"dp_delta": 2.0}, "dp_delta must lie between 0 and 1"),
    "relation": ({"dp_neighbors": "twins"}, "choose one of add-or-remove, replace-one"),
    "idle": ({"dp_noise_multiplier": None}, "would have no effect without dp_epsilon"),
    "rate": ({"learning_rate": "auto"}, "learning rate 'auto' is measured on training examples"),
    "eps": ({"eps": "auto"}, "eps='auto' is measured on training examples"),
    "output gradients": ({"method": "lozo-g"}, "steps along output gradients"),
    "scales": ({"method": "lozo-e", "directions_per": "batch"}, "measures scales of layers"),
    "subspace": ({"method": "agzo"}, "chooses its subspace by training examples"),
    "directions": ({"method": "mezo", "directions_per": "example"}, "tells how many examples"),
    "fitness": ({"method": "mezo", "fitness": "ranks"}, "by all examples together"),
    "baseline": ({"method": "fo-adamw", "eps": None}, "not a zeroth-order method"),
    "order": ({"train_sampling_strategy": "group_by_length"}, "draws each example with the same probability"),
    "data seed": ({"data_seed": 1}, "draws each example with the same probability"),
    "tokens": ({"include_num_input_tokens_seen": "all"}, "tells which examples were drawn"),
    "non-finite": ({"max_nonfinite_steps": 3}, "count as 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_more_of_the_data_is_refused(name: str, tmp_path: Path) -> None:
    changed, reason = REFUSED[name]
    options = {key: value for key, value in PRIVATE.items() if key not in ("eval_dataset", "compute_metrics")}
    with pytest.raises(ValueError, match=reason) as caught:
        config(tmp_path, **{**options, **changed})
    assert "\n" not in str(caught.value)


def test_training_rows_are_not_evaluated(tmp_path: Path) -> None:
    rows = choice_rows()
    with pytest.raises(ValueError, match="evaluated without noise"):
        trainer(tmp_path / "a", **{**PRIVATE, "train_dataset": rows, "eval_dataset": rows}).train()
    with pytest.raises(ValueError, match="not below one over the number of examples"):
        trainer(tmp_path / "b", **{**PRIVATE, "dp_delta": 0.5}).train()
    with pytest.raises(ValueError, match=r"none can be made up .*give an eval_dataset"):
        public_batch([{"pixels": 1}], None, None, collate_choices, 2, 100)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("journal.zo", "noise.key")]


COMMAND = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--num_eval", "8", "--max_steps", "2",
           "--method", "mezo", "--eps", "1e-2", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4", "--logging_steps", "1",
           "--dp_clip", "50", "--output_dir", "out"]  # fmt: skip


def test_the_command_trains_says_what_was_spent_and_replays(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--num_dev", "4"], "--num_dev evaluates rows of the training data"),
        (["--k_shot", "4"], "--k_shot chooses the training rows by their labels"),
        (["--loss_over", "tokens"], "divides an example's loss by the tokens"),
        (["--objective", "accuracy"], "jump by the rounding"),
        (["--train_sampling_strategy", "stratified"], "draws each example with the same probability"),
    ):
        result = run_command(capsys, *COMMAND, "--dp_noise_multiplier", "3", *words)
        assert result.code == 2 and reason in result.err and not Path("out").exists()
    result = run_command(capsys, *COMMAND, "--dp_noise_multiplier", "3")
    assert result.code == 0, result.err
    assert "ε = " in result.out and "at step 2" in result.out and "loss" not in result.out.partition("peak memory")[0]
    summary, run = (json.loads(Path(f"out/{name}.json").read_text()) for name in ("summary", "zotune_run"))
    assert summary["privacy"]["noise_multiplier"] == 3.0 and summary["loss"] == {"first": None, "last": None}
    assert summary["sequences_evaluated"] == 2 * 2 * 4
    first = read_key(Path("out"))
    assert run_command(capsys, "replay", "my-model", "out", "--output_dir", "rebuilt").code == 0
    assert weights_digest("rebuilt") == weights_digest("out") and not Path("rebuilt/_private").exists()
    assert run_command(capsys, *COMMAND, "--dp_noise_multiplier", "3", "--overwrite_output_dir").code == 0
    again = json.loads(Path("out/zotune_run.json").read_text())
    assert read_key(Path("out")) != first
    assert again["examples"]["count"] == run["examples"]["count"]
    assert again["examples"]["digest"] != run["examples"]["digest"]  # it says nothing of the rows without the key
