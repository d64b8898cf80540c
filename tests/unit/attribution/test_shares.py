"""Shares of examples: exact on a quadratic, the same however losses are evaluated and after a resume, refused where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import zotune
from trainer_cases import StopAt, choice_rows, collate_choices, config, journal_of, tiny_llama
from zotune.attribution.shares import Shares, shares_of
from zotune.optim.attribution import Attribution
from zotune.optim.journal import Journal

LR = 0.02


class Quadratic(nn.Module):
    """ℓ_i(θ) = ½ (x_i · θ − y_i)²."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def losses(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return 0.5 * (batch[0] @ self.theta - batch[1]).square()


def _data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, x.sum(dim=1) + torch.randn(count, generator=generator, dtype=torch.float64)


def _steps(tmp_path: Path, method: str, every: int = 1, steps: int = 6, **options: object) -> tuple[Shares, list[float]]:
    """Shares of a run on the quadratic, and the validation losses at all its steps."""
    model, train, validation = Quadratic(), _data(12, 1), _data(9, 2)
    optimizer = zotune.ZerothOrder(
        model, zotune.methods.get(method, eps=1e-3, **options), lr=LR, journal=tmp_path / "journal.zo", forward_batching="sequential"
    )
    attribution = Attribution(optimizer.run, model.losses, [validation], every)
    optimizer.step_estimate.attribute(attribution)
    losses = [float(model.losses(validation).detach().mean())]
    for step in range(steps):
        attribution.rows = (torch.arange(4) + 4 * step) % 12
        optimizer.step(model.losses, (train[0][attribution.rows], train[1][attribution.rows]))
        losses.append(float(model.losses(validation).detach().mean()))
    attribution.finish()
    return shares_of(Journal.open(tmp_path / "journal.zo")), losses


def test_a_quadratic_changes_by_shares_plus_curvature(tmp_path: Path) -> None:
    shares, losses = _steps(tmp_path, "mezo")
    for step, before, after in zip(shares.steps, losses[:-1], losses[1:], strict=True):
        assert step.second is not None and step.second > 0
        assert step.first + step.second == pytest.approx(after - before, rel=1e-4, abs=1e-7)
    assert float(shares.sums.sum()) == pytest.approx(shares.first)
    assert shares.measured == pytest.approx(losses[-1] - losses[0])
    assert shares.warning is not None and "too long for first order" in shares.warning


def test_shares_have_the_mean_of_tracin(tmp_path: Path) -> None:
    shares, _ = _steps(tmp_path, "mezo", steps=1, num_directions=800)
    model, train, validation = Quadratic(), _data(12, 1), _data(9, 2)
    (target,) = torch.autograd.grad(model.losses(validation).mean(), model.theta)
    for row in range(4):
        (gradient,) = torch.autograd.grad(model.losses((train[0][row : row + 1], train[1][row : row + 1])).sum(), model.theta)
        expected = -LR / 4 * float(gradient @ target)
        assert abs(float(shares.sums[row]) - expected) < 4 * float(shares.errors[row])
        assert float(shares.errors[row]) < 0.15 * LR / 4 * float(gradient.norm() * target.norm())


@pytest.mark.parametrize(
    ("method", "options"),
    [("mezo", {"num_directions": 3}), ("mezo", {"directions_per": "example", "num_directions": 2}), ("fzoo", {}), ("kerzoo", {})],
)
def test_small_steps_change_the_loss_by_the_shares(tmp_path: Path, method: str, options: dict) -> None:
    small = LR / 400 if method != "fzoo" else 1e-7  # fzoo divides by the deviation of the losses, about ε
    model, train, validation = Quadratic(), _data(12, 1), _data(9, 2)
    optimizer = zotune.ZerothOrder(
        model, zotune.methods.get(method, eps=1e-4, **options), lr=small, journal=tmp_path / "journal.zo", forward_batching="sequential"
    )
    attribution = Attribution(optimizer.run, model.losses, [validation], 1)
    optimizer.step_estimate.attribute(attribution)
    for step in range(3):
        attribution.rows = torch.arange(4) + 4 * step
        optimizer.step(model.losses, (train[0][attribution.rows], train[1][attribution.rows]))
    attribution.finish()
    shares = shares_of(Journal.open(tmp_path / "journal.zo"))
    assert shares.measured == pytest.approx(shares.first, rel=0.05) and shares.measured != 0


def test_momentum_credits_an_example_for_later_steps(tmp_path: Path) -> None:
    plain, _ = _steps(tmp_path, "mezo", steps=1)
    (tmp_path / "m").mkdir()
    heavy, _ = _steps(tmp_path / "m", "mezo-momentum", steps=3, momentum=0.5)
    assert heavy.steps[0].first == pytest.approx(plain.steps[0].first * (1 + 0.5 + 0.25))
    assert heavy.second is None


def test_steps_between_the_measured_ones_are_scaled(tmp_path: Path) -> None:
    every, _ = _steps(tmp_path, "mezo")
    (tmp_path / "third").mkdir()
    third, _ = _steps(tmp_path / "third", "mezo", every=3)
    assert [step.step for step in third.steps] == [0, 3] and third.scale == 3
    assert third.first == pytest.approx(3 * (every.steps[0].first + every.steps[3].first))
    assert third.first_error > 0 and every.first_error == 0


@pytest.mark.parametrize("method", ["mezo-adam", "lozo-g", "lozo-m", "zo-sgd-sign", "zo-jaguar", "hizoo"])
def test_a_method_without_shares_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"the shares of examples cannot be told for .*take mezo, lozo"):
        Attribution(zotune.ZerothOrder(nn.Linear(4, 4), method, lr=0.1).run, lambda batch: batch, [torch.zeros(2)], 1)


def test_one_loss_for_a_batch_is_refused() -> None:
    model = Quadratic()
    optimizer = zotune.ZerothOrder(model, "mezo", lr=LR)
    attribution = Attribution(optimizer.run, lambda batch: model.losses(batch).mean(), [_data(9, 2)], 1)
    attribution.rows = torch.arange(12)
    optimizer.step_estimate.attribute(attribution)
    before = model.theta.detach().clone()
    with pytest.raises(ValueError, match="one loss for each"):
        optimizer.step(lambda batch: model.losses(batch).mean(), _data(12, 1))
    assert torch.equal(model.theta, before)


def _train(folder: Path, method: str = "lozo", stop: int | None = None, resume: bool = False, **options: object) -> zotune.ZOTrainer:
    trainer = zotune.ZOTrainer(
        model=tiny_llama(),
        args=config(folder, method=method, attribute_every=1, per_device_train_batch_size=8, learning_rate=1e-3, **options),
        train_dataset=choice_rows(),
        data_collator=collate_choices,
        attribute_dataset=choice_rows(12),
        callbacks=[] if stop is None else [StopAt(stop)],
    )
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_batched_and_sequential_runs_give_the_same_shares(tmp_path: Path) -> None:
    found = []
    for way in ("batched", "sequential"):
        _train(tmp_path / way, forward_batching=way, gradient_accumulation_steps=2, max_steps=2)
        found.append(shares_of(journal_of(tmp_path / way), 64))
    left, right = found
    assert torch.equal(left.visits, right.visits) and int(left.visits.sum()) == 2 * 16
    assert torch.allclose(left.sums, right.sums, rtol=0.02, atol=1e-3 * float(left.sums.abs().max()))


def test_a_resumed_run_has_the_same_shares_and_weights(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole", save_strategy="steps", save_steps=3)
    _train(tmp_path / "parts", stop=5, save_strategy="steps", save_steps=3)
    _train(tmp_path / "parts", resume=True, save_strategy="steps", save_steps=3)
    left, right = (shares_of(journal_of(tmp_path / name), 64) for name in ("whole", "parts"))
    assert torch.equal(left.sums, right.sums) and left.end == right.end and len(left.steps) == 6
    replayed = zotune.replay(tiny_llama(), tmp_path / "parts" / "journal.zo")
    replayed.remove_hooks()
    for name, tensor in replayed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_recording_changes_no_step(tmp_path: Path) -> None:
    with_shares = _train(tmp_path / "with", method="mezo")
    without = zotune.ZOTrainer(
        model=tiny_llama(),
        args=config(tmp_path / "without", method="mezo", per_device_train_batch_size=8, learning_rate=1e-3),
        train_dataset=choice_rows(),
        data_collator=collate_choices,
    )
    without.train()
    for name, tensor in without.model.state_dict().items():
        assert torch.equal(tensor, with_shares.model.state_dict()[name]), name


def test_fewer_validation_examples_are_evaluated(tmp_path: Path) -> None:
    few, all_ = (_train(tmp_path / str(n), method="mezo", max_steps=1, attribute_examples=n).zo_optimizer for n in (4, 64))
    assert all_.sequences_evaluated - few.sequences_evaluated == 8 * 4  # of 12: at θ, θ ± εZ, and at the end


def test_flipped_labels_have_the_highest_shares(tmp_path: Path) -> None:
    ranks = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 8, generator=generator)
        y = (x[:, 0] > 0).float()
        flipped = torch.arange(60) < 12
        model = nn.Linear(8, 1)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)

        def losses(batch: tuple[torch.Tensor, torch.Tensor], model: nn.Module = model) -> torch.Tensor:
            return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1], reduction="none")

        clean = torch.randn(40, 8, generator=generator)
        path = tmp_path / f"{seed}.zo"
        optimizer = zotune.ZerothOrder(model, zotune.methods.mezo(num_directions=4), lr=0.1, seed=seed, journal=path)
        attribution = Attribution(optimizer.run, losses, [(clean, (clean[:, 0] > 0).float())], 1)
        optimizer.step_estimate.attribute(attribution)
        for step in range(24):
            attribution.rows = (torch.arange(15) * 4 + step) % 60
            optimizer.step(losses, (x[attribution.rows], (y - flipped.float()).abs()[attribution.rows]))
        sums = shares_of(Journal.open(path)).sums
        ranks.append(float((sums[flipped][:, None] > sums[~flipped][None]).float().mean()))
    assert sum(ranks) / 3 > 0.75, ranks


def test_shares_are_lines_of_json(tmp_path: Path) -> None:
    from zotune.attribution.groups import TrainingRow, by_column, by_example

    shares, _ = _steps(tmp_path, "mezo")
    entries = by_example(shares, [TrainingRow(7 + index, {"source": "ab"[index % 2]}) for index in range(12)])
    assert [entry.share for entry in entries] == sorted((entry.share for entry in entries), reverse=True)
    assert json.loads(entries[0].as_json())["row"]["source"] in "ab"
    sources = by_column(entries, "source")
    assert sum(entry.share for entry in sources) == pytest.approx(float(shares.sums.sum()))
    assert {entry.label: entry.examples for entry in sources} == {"a": 6, "b": 6}
    with pytest.raises(ValueError, match=r"no column 'sorce'.*did you mean 'source'"):
        by_column(entries, "sorce")
