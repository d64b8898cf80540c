"""`zotune train` and `zotune verify` in folders that are not new: refused, restarted, begun, deleted, without readers of their output."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_cases import run_command, weights_digest
from trainer_cases import StopAt, choice_rows, trainer
from zotune import ZOTrainer
from zotune.cli.verify import main as verify
from zotune.optim.distributed import launch
from zotune.optim.distributed import restarted as begun_by_this_launch
from zotune.training import run, run_folder
from zotune.training.run_record import RunRecord

BASE = ["--model_name_or_path", "my-model", "--data_dir", "data", "--use_cpu", "true", "--eval_strategy", "no", "--num_eval", "4"]
WORDS = [*BASE, "--task", "sst2", "--num_train", "16", "--max_steps", "4", "--learning_rate", "1e-3", "--output_dir", "run"]
ZO = [*WORDS, "--method", "lozo", "--save_strategy", "no", "--forward_batching", "batched"]
FO = [*WORDS, "--method", "fo-sgd", "--save_strategy", "no"]


@pytest.fixture
def here(workplace: Path) -> Path:
    return workplace


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def launched(monkeypatch: pytest.MonkeyPatch, attempt: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_a/none_b/attempt_{attempt}/0/error.json")


class Cut(BaseException):
    """A kill."""


def cut(*_: Any, **__: Any) -> None:
    raise Cut


# -- restarts -------------------------------------------------------------------------------------------------------


def test_a_restart_leaves_a_folder_that_was_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run_command(capsys, "train", *ZO).code == 0
    (here / "run/checkpoint-notes").mkdir()
    (here / "run/checkpoint-notes/a.txt").write_text("mine")
    before = everything(here / "run")
    for attempt in (0, 1, 2):
        launched(monkeypatch, attempt)
        result = run_command(capsys, "train", *ZO, "--max_steps", "6", "--seed", "9")
        assert result.code == 2 and "already holds a run" in result.err
        assert everything(here / "run") == before
        assert not begun_by_this_launch("run")


def test_a_restart_continues_its_own_run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run_command(capsys, "train", *ZO, "--output_dir", "straight").code == 0
    assert run_command(capsys, "train", *ZO, "--seed", "9").code == 0
    launched(monkeypatch, 0)
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(RunRecord, "save_model", cut)
        run_command(capsys, "train", *ZO, "--overwrite_output_dir")
    launched(monkeypatch, 1)
    assert begun_by_this_launch("run")
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "clear_run", cut)
        assert run_command(capsys, "train", *ZO, "--overwrite_output_dir").code == 0
    assert weights_digest("run") == weights_digest("straight")
    assert (here / "run/journal.zo").read_bytes() == (here / "straight/journal.zo").read_bytes()


def test_a_trainer_is_restarted_by_its_own_launch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "train_dataset": choice_rows(16)}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(3)], **saving).train()
    launched(monkeypatch, 1)
    assert not begun_by_this_launch(tmp_path)
    launched(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(4)], **saving).train(resume_from_checkpoint=True)
    launched(monkeypatch, 1)
    assert begun_by_this_launch(tmp_path)
    assert json.loads((tmp_path / launch.LAUNCH_FILE).read_text()) == {"agents": launch.agents(run.Workers())}


# -- dead ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [[], ["--resume_from_checkpoint", "true"]], ids=["plain", "resume"])
@pytest.mark.parametrize("words", [ZO, FO], ids=["zo", "fo"])
def test_a_run_without_a_kept_step_begins_anew(
    words: list[str], way: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Killed between the run file and the journal; in first order at any time before the first checkpoint, also after the last step."""
    place = (ZOTrainer, "train") if words is ZO else (RunRecord, "write_summary")
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(*place, cut)
        run_command(capsys, "train", *words)
    assert run_folder.kind_of(here / "run") is run_folder.Kind.BEGUN
    assert verify(["run"]) == 0 and "has kept no step" in capsys.readouterr().out
    result = run_command(capsys, "train", *words, *way)
    assert result.code == 0, result.err
    if way and words is FO:  # ended, and nothing to continue from: neither command refers to the other
        for again in ([], way):
            result = run_command(capsys, "train", *words, *again)
            assert result.code == 2 and "--resume_from_checkpoint" not in result.err and "another --output_dir" in result.err


def test_what_another_process_did_meanwhile_is_seen(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Two starts of which both passed the first check."""
    genuine = run.load_model

    def load(*args: Any, **options: Any) -> Any:
        (here / "run").mkdir()
        for name, text in ((run_folder.RUN_FILE, '{"format": 4}'), ("journal.zo", "another's"), ("summary.json", "{}")):
            (here / "run" / name).write_text(text)
        return genuine(*args, **options)

    monkeypatch.setattr(run, "load_model", load)
    for way in ([], ["--overwrite_output_dir"])[:1]:
        result = run_command(capsys, "train", *ZO, *way)
        assert result.code == 2 and "already holds a run" in result.err
        assert (here / "run/journal.zo").read_text() == "another's" and len(list((here / "run").iterdir())) == 3


# -- what is never deleted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["base", "base of the run", "checkpoint", "data"])
def test_the_base_and_the_data_are_not_overwritten(case: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    saving = [*ZO[:-4], "--save_steps", "2", "--forward_batching", "batched"]
    words = {
        "base": [*ZO, "--output_dir", "my-model"],
        "base of the run": [*saving, "--model_name_or_path", "run"],
        "checkpoint": [*saving, "--model_name_or_path", "run/checkpoint-4"],
        "data": ["--model_name_or_path", "my-model", "--train_file", "run/history.json", "--use_cpu", "true", "--output_dir", "run"],
    }[case]
    if case != "base":
        assert run_command(capsys, "train", *saving).code == 0
    before = everything(here)
    result = run_command(capsys, "train", *words, "--overwrite_output_dir")
    assert result.code == 2 and "choose another --output_dir" in result.err, result.err
    assert everything(here) == before


@pytest.mark.parametrize("words", [ZO, FO], ids=["zo", "fo"])
def test_a_folder_deleted_while_it_is_used_is_an_error(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    genuine = ZOTrainer.training_step

    def step(self: ZOTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 2 and (here / "run").exists():
            shutil.rmtree(here / "run")
        return genuine(self, *args, **options)

    monkeypatch.setattr(ZOTrainer, "training_step", step)
    result = run_command(capsys, "train", *words)
    assert result.code == 2 and "was deleted" in result.err and result.err.count("\n") == 1, result.err
    assert not (here / "run").exists()


# -- output ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_at_a_file_of_rust_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """tokenizer.json is written by Rust, which raises a bare Exception."""
    from zotune.training import checkpointing

    genuine = checkpointing.contents.save_model
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*args: Any) -> None:
        genuine(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

    monkeypatch.setattr(checkpointing.contents, "save_model", save)
    try:
        result = run_command(capsys, "train", *ZO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 2 and "free some space" in result.err and result.err.count("\n") == 1, result.err


ENDED_READER = """
import os, sys
from zotune.cli.main import main
read, write = os.pipe()
os.dup2(write, 1)
os.close(read)
code = main(sys.argv[1:])
os.close(1)
sys.stdout = None
verified = main(["verify", "run"])
os.remove("run/checkpoint-4/config.json")
os.dup2(write, 1)
sys.stdout = open(1, "w", closefd=False)
sys.exit(100 * main(["verify", "run"]) + 10 * verified + code)
"""


@pytest.mark.slow
def test_commands_go_on_without_a_reader_of_their_output(here: Path) -> None:
    """`zotune train | head`: it says so once. `zotune verify` ends with the code of what it found, also with closed output."""
    words = [*ZO[:-4], "--save_steps", "2", "--forward_batching", "batched"]
    done = subprocess.run([sys.executable, "-c", ENDED_READER, "train", *words], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 100, done.stderr
    assert "nobody reads standard output any more" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (here / "run/summary.json").is_file()


def test_verify_names_what_is_no_damage(here: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*ZO[:-4], "--save_steps", "2", "--forward_batching", "batched"]
    assert run_command(capsys, "train", *words).code == 0
    (here / "run/checkpoint-2").rename(here / "run/.checkpoint-2.deleted.partial")  # a deletion that was cut off
    (here / "run/.checkpoint-2.deleted.partial/config.json").unlink()
    assert verify(["run"]) == 0
    said = capsys.readouterr().out
    assert "left by an interrupted save or deletion" in said and "the trained model is whole" in said and "damaged" not in said
    model = here / "run/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert verify(["run"]) == 1 and "model.safetensors is damaged" in capsys.readouterr().out
    (here / "run/summary.json").unlink()  # killed while the model was moved into place
    assert verify(["run"]) == 0 and "resuming writes it again" in capsys.readouterr().out
