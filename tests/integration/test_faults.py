"""Faults on purpose: what a run keeps when the disk, the memory, the data or another process gets in its way."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

import paths
import toys
from command_cases import run_command, save_data
from command_cases import save_model as save_small_model
from trainer_cases import StopAt, choice_rows, collate_choices, journal_of, same_weights, tiny_llama, trainer, weights
from zotune import ZerothOrder
from zotune.cli.verify import main as verify
from zotune.io.atomic import whole_file, write_text
from zotune.io.figures import save_figure, stacked_bars
from zotune.io.json_files import write_json
from zotune.optim.journal import Journal
from zotune.optim.journal_records import StepRecord
from zotune.optim.replay import replay
from zotune.training import resume as resuming
from zotune.training.checkpoint import contents, storage
from zotune.training.curve import Curve, write_curve

RUN: dict[str, Any] = {"max_steps": 6, "train_dataset": choice_rows(40), "forward_batching": "batched", "method": "lozo", "interval": 2}
SAVING = {**RUN, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nothing happens to: its weights and its journal."""
    folder = tmp_path_factory.mktemp("straight")
    run = trainer(folder, **RUN)
    run.train()
    return {"weights": weights(run.model), "journal": (folder / "journal.zo").read_bytes()}


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 5, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[StopAt(5)], **SAVING).train()
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def check_resumed(folder: Path, straight: dict[str, Any]) -> None:
    again = trainer(folder, tiny_llama(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same_weights(weights(again.model), straight["weights"])
    assert (folder / "journal.zo").read_bytes() == straight["journal"]


# -- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_dozen_disturbed_runs_end_as_the_undisturbed_ones() -> None:
    """In a process of its own: what forks should have one thread."""
    names = ["lozo-m", "mezo-adam", "fo-adamw, a fresh head", "torchrun"]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("chaos.py")), "--rounds", "12", "--seed", "1", "--only", *names],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.HELPERS)},
    )
    assert done.returncode == 0, done.stderr
    assert "seed 1: 12 disturbances" in done.stdout and "0 lost, 0 dead ends, 0 changed bytes" in done.stdout


def test_a_second_process_on_the_same_folder_is_refused(stopped: Path, straight: dict[str, Any]) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    descriptor = os.open(stopped, os.O_RDONLY)  # a lock of another opening, as of another process
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"another process is training in .*/run: wait"):
        trainer(stopped, **SAVING).train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    os.close(descriptor)
    check_resumed(stopped, straight)


def test_a_run_cut_off_before_its_first_checkpoint_begins_again(tmp_path: Path, straight: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(1)], **SAVING).train()
    before = (tmp_path / "journal.zo").read_bytes()
    with pytest.raises(ValueError, match="began from other weights than these"):
        trainer(tmp_path, tiny_llama(seed=99), **SAVING).train(resume_from_checkpoint=True)
    assert (tmp_path / "journal.zo").read_bytes() == before
    check_resumed(tmp_path, straight)


# -- files ----------------------------------------------------------------------------------------------------------


CHECKPOINT_FILES = [
    "config.json", "generation_config.json", "model.safetensors", contents.STATE, contents.STATE_TENSORS, contents.SCHEDULER,
    contents.RNG, storage.TRAINER_STATE, storage.ARGUMENTS, storage.MANIFEST,
]  # fmt: skip


def test_these_are_the_files_of_a_checkpoint(stopped_once: Path) -> None:
    assert sorted(path.name for path in (stopped_once / "checkpoint-4").iterdir()) == sorted(CHECKPOINT_FILES)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(name: str, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, journal = stopped / "checkpoint-4" / name, stopped / "journal.zo"
    whole = path.read_bytes()
    assert storage.problem(path.parent, journal) is None
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:-2], whole[: len(whole) // 2], b"", bytes(flipped), None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        fault = storage.problem(path.parent, journal)
        assert fault is not None and "resume from another checkpoint" in fault
        assert (
            name in fault or name == storage.MANIFEST or (content is None and name == "model.safetensors" and "holds no weights" in fault)
        )
        assert resuming.checkpoint_of(stopped, stopped / "journal.zo", True, alone=True) == stopped / "checkpoint-2"
        assert verify([str(stopped)]) == 1
        said = capsys.readouterr().out
        assert f"damaged: {fault}" in said and f"resuming goes on from {stopped / 'checkpoint-2'}" in said


def test_the_run_goes_on_bit_for_bit_from_the_checkpoint_before(stopped: Path, straight: dict[str, Any]) -> None:
    path = stopped / "checkpoint-4/model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    check_resumed(stopped, straight)


def test_a_whole_run_is_verified(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(stopped)]) == 0
    assert "5 steps intact" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no run"):
        (stopped.parent / "empty").mkdir()
        verify([str(stopped.parent / "empty")])


@pytest.mark.parametrize("content", [b"", None, "half", "flipped"])
def test_a_damaged_journal_stops_a_resumption_and_stays_as_it_is(content: Any, stopped: Path) -> None:
    path = stopped / "journal.zo"
    whole = path.read_bytes()
    if content == "half":
        content = whole[: len(whole) // 4]
    elif content == "flipped":
        content = bytearray(whole)
        content[-100] ^= 1
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"journal\.zo"):
        trainer(stopped, **SAVING).train(resume_from_checkpoint=True)
    assert (path.read_bytes() if path.exists() else None) == content


def test_a_manifest_cannot_point_out_of_its_folder(stopped: Path) -> None:
    path = stopped / "checkpoint-4" / storage.MANIFEST
    for name in ("../checkpoint-2/config.json", "/etc/passwd"):
        content = json.loads(path.read_text())
        content["files"][name] = {"bytes": 1, "sha256": ""}
        path.write_text(json.dumps(content))
        fault = storage.problem(path.parent, stopped / "journal.zo")
        assert fault is not None and "outside of the folder" in fault
        del content["files"][name]
        path.write_text(json.dumps(content))


# -- the disk -------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_any_sync_loses_nothing(tmp_path: Path, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sync in turn, of the journal and of every file of a checkpoint, is the one that fails."""
    genuine, folder = os.fsync, tmp_path / "run"
    left, failures = 0, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    while True:
        left = 5 + failures  # a little further each time
        resume = (folder / "journal.zo").exists() or None
        run = trainer(folder, **SAVING)
        try:
            run.train(resume_from_checkpoint=resume)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failures += 1
            assert not list(folder.glob("checkpoint-*/*.tmp")) and failures < 60
            assert all(storage.problem(saved, folder / "journal.zo") is None for saved in storage.checkpoints(folder))
    assert failures >= 5
    assert same_weights(weights(run.model), straight["weights"])
    assert (folder / "journal.zo").read_bytes() == straight["journal"]


def test_a_record_that_the_disk_takes_in_part_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.classifier()
    optimizer = ZerothOrder(model, "mezo", lr=1e-2, journal=tmp_path / "j", forward_batching="sequential")
    optimizer.step(toys.loss_function(model), toys.batch())
    before, kept = weights(model), (tmp_path / "j").read_bytes()
    genuine = os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda descriptor, blob, at: genuine(descriptor, blob[:7], at))
        with pytest.raises(OSError, match="free some space and resume"):
            optimizer.step(toys.loss_function(model), toys.batch())
    assert same_weights(weights(model), before) and optimizer.steps == 1
    assert len(Journal.open(tmp_path / "j")) == 1
    optimizer.step(toys.loss_function(model), toys.batch())
    assert len(Journal.open(tmp_path / "j")) == 2 and (tmp_path / "j").read_bytes().startswith(kept)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the longest file that this process can write: what is longer fails half-way, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, {"rows": list(range(5000))}),
    "curve": lambda path: write_curve(Curve([(1, 2.0), (2, 1.0)], [(0, 0.5)], "accuracy"), path),
    "report": lambda path: write_text(path, "x" * 20_000),
    "tensors": lambda path: write_tensors(path, torch.zeros(5000)),
    "chart": lambda path: save_figure(stacked_bars({"lozo": [1.0]}, {"weights": "black"}, "GB"), path),
}


def write_tensors(path: Path, tensor: torch.Tensor) -> None:
    with whole_file(path) as partial:
        save_file({"x": tensor}, partial)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_leaves_the_old_one(name: str, tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    path = tmp_path / ("chart.png" if name in ("chart", "curve") else "file")
    path.write_bytes(b"old")
    full_disk(4000)
    with pytest.raises((OSError, SafetensorError)):
        WRITERS[name](path)
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == [path.name]
    full_disk(1 << 30)
    WRITERS[name](path)
    assert path.stat().st_size > 4000 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("saving", ["no", "steps"])
def test_a_full_disk_keeps_the_journal_which_restores_the_model(
    saving: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full_disk: Callable[[int], None]
) -> None:
    """The whole command: one sentence, nothing half-written, and the same command goes on when there is room."""
    monkeypatch.chdir(tmp_path)
    save_small_model(tmp_path / "my-model")
    save_data(tmp_path)
    words = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "4", "--learning_rate", "1e-3"]
    words += ["--save_strategy", saving, "--forward_batching", "batched", *(["--save_steps", "2"] if saving == "steps" else [])]
    assert run_command(capsys, "train", *words, "--output_dir", "straight").code == 0
    size = (tmp_path / "my-model/model.safetensors").stat().st_size
    full_disk(size - 100)
    result = run_command(capsys, "train", *words, "--output_dir", "cut")
    assert result.code == 2 and result.err.count("\n") == 1 and "free some space" in result.err, result.err
    names = {path.name for path in Path("cut").iterdir()}
    assert not any(name.endswith(".partial") or name.startswith(("model", "checkpoint-", "summary")) for name in names), names
    assert len(Journal.open("cut/journal.zo")) == (4 if saving == "no" else 2)
    assert verify(["cut"]) == 0
    full_disk(1 << 30)
    assert run_command(capsys, "train", *words, "--output_dir", "cut", "--resume_from_checkpoint", "true").code == 0
    for name in ("model.safetensors", "journal.zo"):
        assert Path("cut", name).read_bytes() == Path("straight", name).read_bytes()


def test_a_disk_that_is_full_from_the_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full_disk: Callable[[int], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_small_model(tmp_path / "my-model")
    save_data(tmp_path)
    full_disk(0)
    words = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "4", "--output_dir", "cut"]
    result = run_command(capsys, "train", *words)
    assert result.code == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
    assert "free some space" in result.err
    assert not Path("cut").exists() or not any(Path("cut").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        trainer(tmp_path / "run", **SAVING).train()
    assert not any((tmp_path / "run").iterdir())


READ_ONLY = """
import os, sys
from pathlib import Path
from zotune.training.checkpoint.storage import draft
from zotune.optim.journal import Journal
from zotune.optim.journal_records import StepRecord
from zotune.io.figures import save_figure, stacked_bars
from zotune.io.json_files import write_json
os.setgroups([])
os.setgid(65534)
os.setuid(65534)  # root may write anywhere
folder = Path(sys.argv[1])
tried = [lambda: Journal.create(folder / "j", {}), lambda: write_json(folder / "s", {}), lambda: write_json(folder / "old", {}),
         lambda: Journal.open(folder / "journal.zo").append(StepRecord(0, (1.0,), 1.0, (1.0,), (False,))),
         lambda: draft(folder / "checkpoint-1").__enter__()]
for attempt in tried:
    try:
        attempt()
    except OSError as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="as another user, which only root can become")
def test_a_read_only_folder_stays_as_it_is() -> None:
    """What root can test of it: as nobody, in a folder of root's."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        Journal.create(folder / "journal.zo", {})
        (folder / "old").write_text("old")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        folder.chmod(0o555)
        (folder / "journal.zo").chmod(0o444)
        done = subprocess.run([sys.executable, "-c", READ_ONLY, name], capture_output=True, text=True)
        assert done.stdout.split() == ["PermissionError"] * 5, done.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -- inside a step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_leaves_the_weights_and_names_a_batch_size(error: Exception, tmp_path: Path, straight: dict[str, Any]) -> None:
    model = tiny_llama()
    run = trainer(tmp_path, model, per_device_train_batch_size=16, **SAVING)

    def full(*_: Any) -> None:
        if run.zo_optimizer.steps == 3:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(MemoryError, match=r"step 3, .*try per_device_train_batch_size=8 with gradient_accumulation_steps=2"):
        run.train()
    handle.remove()
    reached = trainer(tmp_path / "reached", **{**RUN, "max_steps": 3})
    reached.train()
    assert len(journal_of(tmp_path)) == 3 and same_weights(weights(model), weights(reached.model))
    check_resumed(tmp_path, straight)


def test_a_loader_that_raises_leaves_a_run_that_goes_on(tmp_path: Path, straight: dict[str, Any]) -> None:
    calls = 0

    def collate(rows: list[Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError("the data's disk went away")
        return collate_choices(rows)

    with pytest.raises(OSError, match="went away"):
        trainer(tmp_path, data_collator=collate, **SAVING).train()
    assert len(journal_of(tmp_path)) >= 3
    check_resumed(tmp_path, straight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(4))
def test_either_loss_of_a_direction_may_be_no_number(which: int, bad: float, tmp_path: Path) -> None:
    """θ + εZ and θ − εZ of two directions in turn: that direction counts for nothing, the other as ever, and the journal replays."""
    model = toys.classifier()
    optimizer = ZerothOrder(model, toys.method("mezo", num_directions=2), lr=1e-2, journal=tmp_path / "j", forward_batching="sequential")
    usual, calls = toys.loss_function(model), 0
    optimizer.step(usual, toys.batch())  # the first compares ways of evaluating

    def loss(batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return usual(batch) * (bad if calls == which + 1 else 1.0)

    before = weights(model)
    optimizer.step(loss, toys.batch(seed=1))
    assert calls == 4
    record = [each for each in Journal.open(tmp_path / "j").records() if isinstance(each, StepRecord)][-1]
    assert sorted(record.skipped) == [False, True] and record.coefficients[record.skipped.index(True)] == 0.0
    assert record.coefficients[record.skipped.index(False)] != 0.0
    assert not same_weights(weights(model), before) and all(tensor.isfinite().all() for tensor in weights(model).values())
    rebuilt = toys.classifier()
    replay(rebuilt, tmp_path / "j", method=optimizer.method).remove_hooks()
    assert same_weights(weights(rebuilt), weights(model))


def test_a_loss_spike_is_a_step_like_others_and_replays(tmp_path: Path) -> None:
    model = toys.classifier()
    optimizer = ZerothOrder(model, "mezo", lr=1e-4, journal=tmp_path / "j", forward_batching="sequential")
    usual = toys.loss_function(model)
    for step in range(4):
        optimizer.step(lambda batch, step=step: usual(batch) * (1e6 if step == 2 else 1.0), toys.batch(seed=step))
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    found = [record for record in Journal.open(tmp_path / "j").records() if isinstance(record, StepRecord)]
    assert found[2].loss > 1e4 > found[1].loss and not any(record.skipped[0] for record in found)


# -- hostile input --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journal_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "j"
    journal = Journal.create(path, {"seed": 0, "groups": [1]})
    for step in range(5):
        journal.append(StepRecord(step, (1e-3,), 0.5, (0.25, -1.5), (False, step == 2)))
    journal.append({"event": "fold"})
    journal.close()
    return path, path.read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), max_size=4), cut=st.integers(0, 400), junk=st.binary(max_size=300)
)
def test_any_bytes_are_a_prefix_of_the_journal_or_a_sentence(
    journal_bytes: tuple[Path, bytes], edits: list[tuple[int, bytes]], cut: int, junk: bytes
) -> None:
    path, whole = journal_bytes
    content = bytearray(whole)
    for at, piece in edits:
        content[at : at + len(piece)] = piece
    path.write_bytes(bytes(content[: len(content) - cut] if cut < len(content) else junk))
    try:
        found = list(Journal.open(path).records())
    except ValueError as error:
        assert str(path) in str(error)
        return
    path.write_bytes(whole)
    assert found == list(Journal.open(path).records())[: len(found)]
