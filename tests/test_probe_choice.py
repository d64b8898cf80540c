"""``probe="auto"`` measures once which way is faster, and a run keeps what was found."""

from __future__ import annotations

import copy

import pytest
import torch

import toys
from zotune import ZerothOrder, evaluating, methods
from zotune.journal import Journal
from zotune.replaying import replay


@pytest.fixture
def sequential_is_faster(monkeypatch):
    """A clock by which a batched evaluation takes a second and a sequential one a tenth."""
    monkeypatch.setattr(
        evaluating, "clock", iter([time for k in range(1000) for time in (2 * k, 2 * k + 1, 2 * k + 1, 2 * k + 1.1)]).__next__
    )


def run(optimizer: ZerothOrder, steps: range) -> list[torch.Tensor]:
    found = []
    for step in steps:
        optimizer.step(toys.loss_function(optimizer.model), toys.batch(8, seed=step))
        found.append(optimizer.last.coefficients)
    return found


def events(path) -> list[dict]:
    return [record for record in Journal.open(path).records() if isinstance(record, dict)]


@pytest.mark.parametrize("num_directions", [1, 8, "example"])
def test_auto_takes_the_faster_way_and_says_so(sequential_is_faster, tmp_path, num_directions, recwarn):
    optimizer = ZerothOrder(toys.classifier(), methods.lozo(num_directions=num_directions), lr=1e-3, journal=tmp_path / "j")
    run(optimizer, range(2))
    assert optimizer.evaluations.batched is False
    assert events(tmp_path / "j") == [{"event": "probe", "batched": False}]
    assert not recwarn.list


@pytest.mark.parametrize("way", ["batched", "sequential"])
def test_what_was_asked_for_is_not_measured(sequential_is_faster, tmp_path, way):
    optimizer = ZerothOrder(toys.classifier(), "lozo", lr=1e-3, probe=way)
    run(optimizer, range(1))
    assert optimizer.evaluations.batched == (way == "batched")


def test_short_evaluations_are_batched_without_a_measurement():
    """A toy's: so that which of the two is chosen is not left to chance."""
    optimizer = ZerothOrder(toys.classifier(), "lozo", lr=1e-3)
    run(optimizer, range(1))
    assert optimizer.evaluations.batched


@pytest.mark.parametrize("from_state", [True, False])
def test_a_resumed_run_keeps_the_choice_bit_for_bit(sequential_is_faster, monkeypatch, tmp_path, from_state):
    """From a checkpoint, and from the journal alone, though batched would be chosen now."""
    straight = ZerothOrder(toys.classifier(), methods.lozo(eps=1e-2), lr=1e-2, journal=tmp_path / "j")
    run(straight, range(2))
    state, weights = copy.deepcopy(straight.state_dict()), copy.deepcopy(straight.model.state_dict())
    records = list(Journal.open(tmp_path / "j").records())
    expected = run(straight, range(2, 5))

    monkeypatch.setattr(evaluating, "clock", lambda: 0.0)
    model = toys.classifier()
    resumed = ZerothOrder(model, methods.lozo(eps=1e-2), lr=1e-2)
    if from_state:
        model.load_state_dict(weights)
        resumed.load_state_dict(state)
    else:
        for record in records:
            resumed.apply(record)
        resumed._prepared = True
    assert resumed.evaluations.batched is False
    assert all(torch.equal(a, b) for a, b in zip(run(resumed, range(2, 5)), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), straight.model.state_dict().values(), strict=True))
    replayed = replay(toys.classifier(), tmp_path / "j")
    assert all(torch.equal(a, b) for a, b in zip(replayed.model.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_batched_run_stays_batched_when_it_is_resumed_from_its_journal(monkeypatch, tmp_path, request):
    straight = ZerothOrder(toys.classifier(), methods.lozo(eps=1e-2), lr=1e-2, journal=tmp_path / "j")
    run(straight, range(2))
    assert events(tmp_path / "j") == []
    request.getfixturevalue("sequential_is_faster")
    resumed = ZerothOrder(toys.classifier(), methods.lozo(eps=1e-2), lr=1e-2)
    for record in Journal.open(tmp_path / "j").records():
        resumed.apply(record)
    assert all(torch.equal(a, b) for a, b in zip(run(resumed, range(2, 4)), run(straight, range(2, 4)), strict=True))
    assert resumed.evaluations.batched and straight.evaluations.batched


def test_another_way_can_be_asked_for_on_resuming(sequential_is_faster):
    first = ZerothOrder(toys.classifier(), "lozo", lr=1e-3)
    run(first, range(1))
    second = ZerothOrder(toys.classifier(), "lozo", lr=1e-3, probe="batched")
    second.load_state_dict(first.state_dict())
    run(second, range(1, 2))
    assert first.evaluations.batched is False and second.evaluations.batched
