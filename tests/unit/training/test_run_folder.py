"""What a folder is, what `zotune train` does with it, and whose files are deleted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zotune.io.lock import check_in_place, locked
from zotune.optim.distributed import Workers, launch, restarted
from zotune.training import run_folder
from zotune.training.checkpoint import storage
from zotune.training.run_folder import Kind, kind_of, start_in


def run_file(folder: Path) -> None:
    write(folder / run_folder.RUN_FILE, json.dumps({"format": storage.FORMAT}))


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def checkpoint(folder: Path, step: int) -> Path:
    with storage.draft(folder / f"checkpoint-{step}") as draft:
        write(draft / "model.safetensors", f"step {step}")
        write(draft / "tokens/tokenizer.json")
        storage.write_manifest(draft)
    return folder / f"checkpoint-{step}"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


FOLDERS: dict[str, tuple[Kind, Callable[[Path], object]]] = {
    "nothing": (Kind.UNUSED, lambda _: None),
    "notes": (
        Kind.UNUSED,
        lambda here: (write(here / "notes.txt"), write(here / "checkpoint-notes/a.txt"), write(here / "checkpoint-3/b")),
    ),
    "a killed save": (Kind.UNUSED, lambda here: write(here / ".zotune_run.json.partial")),
    "a launch without a run": (Kind.UNUSED, lambda here: write(here / launch.LAUNCH_FILE)),
    "a run file": (Kind.BEGUN, run_file),
    "a run file and a head": (Kind.BEGUN, lambda here: (run_file(here), write(here / run_folder.HEAD_FILE))),
    "a run being deleted": (Kind.BEGUN, lambda here: (write(here / "journal.zo"), write(here / run_folder.RUN_FILE, '{"cleared": true}'))),
    "a journal": (Kind.KEPT, lambda here: (run_file(here), write(here / "journal.zo"))),
    "a checkpoint": (Kind.KEPT, lambda here: (run_file(here), checkpoint(here, 4))),
    "an end without steps": (Kind.ENDED, lambda here: (run_file(here), write(here / "summary.json"))),
    "a trainer's journal": (Kind.TRAINER, lambda here: write(here / "journal.zo")),
    "a trainer's checkpoint": (Kind.TRAINER, lambda here: checkpoint(here, 4)),
    "a model": (Kind.FOREIGN, lambda here: write(here / "config.json")),
    "a checkpoint of others": (Kind.FOREIGN, lambda here: write(here / "checkpoint-500/model.safetensors")),
}
NEW, ANEW, ON = (None, False), (None, True), (True, False)
#: kind -> what the plain command, resuming and overwriting do; a text: refused, and said how to go on
RULE: dict[Kind, tuple[object, object, object]] = {
    Kind.UNUSED: (NEW, "start one without --resume_from_checkpoint", NEW),
    Kind.BEGUN: (ANEW, ANEW, ANEW),
    Kind.KEPT: ("--resume_from_checkpoint true.*--overwrite_output_dir", ON, ANEW),
    Kind.ENDED: ("choose another --output_dir.*--overwrite_output_dir", "kept no step to continue from", ANEW),
    Kind.TRAINER: ("resume_from_checkpoint=True", "there is no zotune_run.json", ANEW),
    Kind.FOREIGN: ("choose another --output_dir",) * 3,
}


@pytest.mark.parametrize("case", FOLDERS)
def test_one_rule_says_what_each_command_does(case: str, tmp_path: Path) -> None:
    kind, make = FOLDERS[case]
    make(tmp_path)
    assert kind_of(tmp_path) is kind
    for (wanted, overwrite), expected in zip(((None, False), ("true", False), (None, True)), RULE[kind], strict=True):
        if isinstance(expected, str):
            with pytest.raises((ValueError, OSError), match=expected):
                start_in(tmp_path, wanted, overwrite=overwrite, restarted=False)
        else:
            assert start_in(tmp_path, wanted, overwrite=overwrite, restarted=False) == expected


def test_no_kind_of_folder_is_a_dead_end() -> None:
    """Where the plain command is refused, another one is not, but for files of others."""
    for kind, (plain, resume, overwrite) in RULE.items():
        assert not all(isinstance(each, str) for each in (plain, resume)) or not isinstance(overwrite, str) or kind is Kind.FOREIGN


def test_resuming_and_overwriting_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        start_in(tmp_path, "true", overwrite=True, restarted=False)
    assert start_in(tmp_path, "false", overwrite=True, restarted=False) == NEW


# -- clearing -------------------------------------------------------------------------------------------------------


def full_run(folder: Path) -> dict[str, bytes]:
    """A finished run with files of the user's in it; returns these."""
    for name in ("notes.txt", "README.md", "checkpoint-notes/a.txt", "checkpoint-500/pytorch_model.bin", ".mine.partial"):
        write(folder / name, "mine")
    mine = files(folder)
    run_file(folder)
    for name in (
        "journal.zo",
        "history.json",
        run_folder.HEAD_FILE,
        launch.LAUNCH_FILE,
        ".checkpoint-6.partial/half",
        ".model.partial/half",
    ):
        write(folder / name)
    with storage.draft(folder / run_folder.ADAPTER_FOLDER) as draft:
        write(draft / "adapter_config.json")
        storage.write_manifest(draft)
    checkpoint(folder, 2)
    write(checkpoint(folder, 4) / "note.txt", "mine")
    mine["checkpoint-4/note.txt"] = b"mine"
    for name in ("config.json", "model.safetensors", "README.md"):
        write(folder / ".model.partial" / name, "model")
    shutil.rmtree(folder / ".model.partial/half", ignore_errors=True)
    (folder / ".model.partial/half").unlink(missing_ok=True)
    run_folder.publish(folder / ".model.partial", folder)
    mine["README.md.before"] = mine.pop("README.md")
    write(folder / "summary.json")
    return mine


def test_only_files_that_a_run_wrote_are_deleted(tmp_path: Path) -> None:
    mine = full_run(tmp_path)
    assert (tmp_path / "README.md").read_text() == "model"
    run_folder.clear_run(tmp_path)
    assert files(tmp_path) == mine
    assert not (tmp_path / "checkpoint-2").exists() and not (tmp_path / "initial_adapter").exists()


def test_models_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model is moved into place, and that is cut off: no file of the first is left."""
    for text, names in (("first", ("config.json", "a.safetensors", "b.safetensors")), ("second", ("a.safetensors", "config.json"))):
        for name in names:
            write(tmp_path / ".model.partial" / name, text)
        if text == "first":
            run_folder.publish(tmp_path / ".model.partial", tmp_path)
            write(tmp_path / "summary.json")
    genuine, left = os.replace, 2

    def replace(source: object, target: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        genuine(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", replace)
        run_folder.publish(tmp_path / ".model.partial", tmp_path)
    found = files(tmp_path)
    assert {found[name] for name in found if "/" not in name and name != storage.MANIFEST} == {b"second"}
    shutil.rmtree(tmp_path / ".model.partial")
    for name in ("a.safetensors", "config.json"):
        write(tmp_path / ".model.partial" / name, "second")
    run_folder.publish(tmp_path / ".model.partial", tmp_path)
    assert sorted(files(tmp_path)) == ["a.safetensors", "config.json", storage.MANIFEST]
    assert storage.damage(tmp_path) is None


def test_a_deletion_cut_off_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_run(tmp_path / "run")
    genuine, left = os.unlink, 0

    def unlink(path: object, **options: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        genuine(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    for number in range(100):
        here = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", here)
        left = number
        try:
            run_folder.clear_run(here)
            break
        except KeyboardInterrupt:
            left = 1000
        assert kind_of(here) is Kind.BEGUN and start_in(here, "true", overwrite=False, restarted=False) == ANEW
        with pytest.raises(FileNotFoundError, match="being deleted"):
            run_folder.read_run(here)
        shutil.rmtree(here)
    assert number > 10


def test_sources_of_a_run_are_never_deleted(tmp_path: Path) -> None:
    full_run(tmp_path / "run")
    data = tmp_path / "run/rows.jsonl"
    write(data)
    run_folder.check_sources(tmp_path / "run", [None, tmp_path, data, "facebook/opt-125m", tmp_path / "run/checkpoint-notes"])
    os.symlink(tmp_path / "run/checkpoint-4", tmp_path / "link")
    for source in ("run", "run/checkpoint-4", "run/initial_adapter", "run/summary.json", "link"):
        with pytest.raises(ValueError, match="among the files of the run"):
            run_folder.check_sources(tmp_path / "run", [tmp_path / source])


# -- launches -------------------------------------------------------------------------------------------------------


def under_torchrun(monkeypatch: pytest.MonkeyPatch, name: str, attempt: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_{name}/none_x/attempt_{attempt}/0/error.json" if name else "")


@pytest.mark.parametrize("log", ["a", ""])
def test_a_restart_continues_what_its_own_launch_began(log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file(tmp_path)
    write(tmp_path / "journal.zo")
    under_torchrun(monkeypatch, log, 1)
    assert not restarted(tmp_path)  # somebody else's run, which the first attempt was refused for
    with pytest.raises(FileExistsError, match="already holds a run"):
        start_in(tmp_path, None, overwrite=False, restarted=False)
    under_torchrun(monkeypatch, log, 0)
    launch.mark(tmp_path, launch.agents(Workers()))
    assert not restarted(tmp_path)
    under_torchrun(monkeypatch, log, 1)
    assert restarted(tmp_path)
    for wanted, overwrite in ((None, False), (None, True), (str(tmp_path / "checkpoint-1"), False)):
        assert start_in(tmp_path, wanted, overwrite=overwrite, restarted=True) == ON
    under_torchrun(monkeypatch, "other", 1)
    assert not restarted(tmp_path)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name)
    launch.mark(tmp_path, launch.agents(Workers()))  # a run without torchrun takes the folder over
    under_torchrun(monkeypatch, log, 2)
    assert not restarted(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"agents": 3}', '{"agents": [null, {}]}', "[" * 100_000])
def test_a_damaged_launch_file_is_nobodys(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / launch.LAUNCH_FILE, content)
    under_torchrun(monkeypatch, "a", 1)
    assert not restarted(tmp_path)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def numbers(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in storage.checkpoints(folder)]


def test_checkpoints_rotate_by_their_steps(tmp_path: Path) -> None:
    """Dated in the future or not: the clock of a machine may be wrong, and a copy has other times."""
    write(tmp_path / "checkpoint-1/model.safetensors")  # not of a run
    for step in (4, 10, 6, 8):
        folder = checkpoint(tmp_path, step)
        os.utime(folder, (2e9 - step, 2e9 - step))
        storage.rotate(tmp_path, 3, folder, None)
    assert numbers(tmp_path) == [8, 6, 4, 1], "10 was left behind by a run that went back"
    storage.rotate(tmp_path, 1, folder, tmp_path / "checkpoint-4")
    assert numbers(tmp_path) == [8, 4, 1]
    storage.rotate(tmp_path, None, folder, None)
    storage.rotate(tmp_path, 1, folder, None)
    assert numbers(tmp_path) == [8, 1] and not storage.leftovers(tmp_path)


def test_a_checkpoint_is_deleted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = checkpoint(tmp_path, 4)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "unlink", killed)
        storage.delete(folder)
    assert storage.checkpoints(tmp_path) == []
    assert [path.name for path in storage.leftovers(tmp_path)] == [".checkpoint-4.deleted.partial"]
    storage.remove_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_being_replaced_is_never_lost(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    write(folder / "note.txt", "mine")
    folder.rename(tmp_path / ".checkpoint-4.replaced.partial")  # killed between two renames
    storage.remove_drafts(tmp_path)
    assert (folder / "model.safetensors").read_text() == "step 4"
    checkpoint(tmp_path, 4)
    assert (folder / "note.txt").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


# -- the lock -------------------------------------------------------------------------------------------------------


def test_a_folder_that_was_deleted_or_replaced_is_noticed(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        check_in_place(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(OSError, match="was deleted or moved"):
            check_in_place(tmp_path / "run")
        (tmp_path / "run").mkdir()
        with pytest.raises(OSError, match="was deleted or moved"):
            check_in_place(tmp_path / "run")
