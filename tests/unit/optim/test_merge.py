"""Merging journals: one is a replay, several are the average of what they trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import toys
import zotune
from command_cases import run_command, save_data, save_model, weights_digest
from zotune.weights.digest import digest


def train(folder: Path, seed: int, method: str = "lozo", steps: int = 5, **options: object) -> tuple[Path, torch.nn.Module]:
    model = toys.classifier()
    path = folder / f"{method}-{seed}.zo"
    optimizer = zotune.ZerothOrder(model, method, lr=1e-2, seed=seed, journal=path, **options)
    for step in range(steps):
        optimizer.step(toys.loss_function(model), toys.batch(8, seed=10 * seed + step))
    optimizer.remove_hooks()
    return path, model


def test_one_journal_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    path, trained = train(tmp_path, 1)
    assert digest(zotune.merge(toys.classifier(), [path])) == digest(trained)
    assert digest(zotune.merge(toys.classifier(), [path, path, path])) == digest(trained)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_several_are_averaged(tmp_path: Path, weights: list[float] | None) -> None:
    runs = [train(tmp_path, 1), train(tmp_path, 2, "mezo", steps=3)]
    shares = [0.5, 0.5] if weights is None else [0.25, 0.75]
    merged = zotune.merge(toys.classifier(), [path for path, _ in runs], weights)
    parameters = [list(model.parameters()) for _, model in runs]
    for found, first, second in zip(merged.parameters(), *parameters, strict=True):
        assert torch.equal(found, (shares[0] * first.double() + shares[1] * second.double()).float())
        assert not torch.equal(first, second)


def test_what_no_run_trained_stays(tmp_path: Path) -> None:
    model = toys.classifier()
    base = copy.deepcopy(model)
    head = list(model[4].parameters())
    path = tmp_path / "head.zo"
    optimizer = zotune.ZerothOrder(model, "mezo", lr=1e-2, params=head, journal=path)
    optimizer.step(toys.loss_function(model), toys.batch())
    optimizer.remove_hooks()
    merged = zotune.merge(copy.deepcopy(base), [path, train(tmp_path, 3)[0]])
    assert not torch.equal(merged[4].weight, base[4].weight)
    alone = zotune.merge(copy.deepcopy(base), [path])
    assert torch.equal(alone[1].weight, base[1].weight)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    path, trained = train(tmp_path, 1)
    with pytest.raises(ValueError, match="nothing to merge"):
        zotune.merge(toys.classifier(), [])
    with pytest.raises(ValueError, match="1 journals and 2 weights"):
        zotune.merge(toys.classifier(), [path], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights must be numbers of at least 0"):
        zotune.merge(toys.classifier(), [path], [-1.0])
    with pytest.raises(ValueError, match=r"lozo-1\.zo: this model is not the one"):
        zotune.merge(trained, [path])


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    common = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "3", "--learning_rate", "1e-2"]
    for seed in ("1", "2"):
        assert run_command(capsys, "train", *common, "--seed", seed, "--output_dir", f"run-{seed}").code == 0
    done = run_command(capsys, "merge", "my-model", "run-1", "run-2/journal.zo", "--weights", "2", "1", "--output_dir", "merged")
    assert done.code == 0, done.err
    assert "2 runs (3 of lozo-g, 3 of lozo-g), averaged" in done.out
    assert run_command(capsys, "merge", "my-model", "run-1", "--output_dir", "same").code == 0
    assert weights_digest("same") == weights_digest("run-1") != weights_digest("merged")
    assert run_command(capsys, "eval", "--model_name_or_path", "merged", "--task", "sst2", "--data_dir", "data").code == 0
    for words, text in (
        (["my-model", "run-1"], "needs --output_dir"),
        (["my-model", "run-1", "--output_dir", "merged"], "is not empty"),
        (["my-model", "run-1", "--weights", "1", "2", "--output_dir", "x"], "1 journals and 2 --weights"),
        (["my-model", "nowhere", "--output_dir", "x"], "no journal at nowhere"),
        (["run-1", "run-2", "--output_dir", "x"], "not the one the journal starts from"),
    ):
        failed = run_command(capsys, "merge", *words)
        assert failed.code == 2 and text in failed.err, failed.err
        assert not Path("x").exists()
