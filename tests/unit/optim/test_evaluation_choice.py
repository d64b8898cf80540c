"""``forward_batching="auto"`` measures once which way is faster, and a run keeps what was found."""

from __future__ import annotations

import copy

import pytest
import torch

import toys
from zotune import ZerothOrder, methods
from zotune.io.execution import Execution, executing
from zotune.optim.journal import Journal
from zotune.optim.replay import replay


@pytest.fixture
def sequential_is_faster():
    """A clock by which a batched evaluation takes a second and a sequential one a tenth."""
    times = iter([time for k in range(1000) for time in (2 * k, 2 * k + 1, 2 * k + 1, 2 * k + 1.1)])
    with executing(Execution(clock=times.__next__)):
        yield


def run(optimizer: ZerothOrder, steps: range) -> list[torch.Tensor]:
    found = []
    for step in steps:
        optimizer.step(toys.loss_function(optimizer.model), toys.batch(8, seed=step))
        found.append(optimizer.last_report.coefficients)
    return found


def events(path) -> list[dict]:
    return [record for record in Journal.open(path).records() if isinstance(record, dict)]


@pytest.mark.parametrize("directions", [{"num_directions": 1}, {"num_directions": 8}, {"directions_per": "example"}])
def test_auto_takes_the_faster_way_and_says_so(sequential_is_faster, tmp_path, directions, recwarn):
    optimizer = ZerothOrder(toys.classifier(), methods.lozo(**directions), lr=1e-3, journal=tmp_path / "j")
    run(optimizer, range(2))
    assert optimizer.evaluator.batched is False
    rowwise = {"rowwise": True} if "directions_per" in directions else {}
    assert events(tmp_path / "j") == [{"event": "forward_batching", "batched": False, **rowwise}]
    assert not recwarn.list


@pytest.mark.parametrize("way", ["batched", "sequential"])
def test_what_was_asked_for_is_not_measured(sequential_is_faster, tmp_path, way):
    optimizer = ZerothOrder(toys.classifier(), "lozo", lr=1e-3, forward_batching=way)
    run(optimizer, range(1))
    assert optimizer.evaluator.batched == (way == "batched")


def test_short_evaluations_are_batched_without_a_measurement():
    """A toy's: so that which of the two is chosen is not left to chance."""
    optimizer = ZerothOrder(toys.classifier(), "lozo", lr=1e-3)
    run(optimizer, range(1))
    assert optimizer.evaluator.batched


@pytest.mark.parametrize("from_state", [True, False])
def test_a_resumed_run_keeps_the_choice_bit_for_bit(sequential_is_faster, tmp_path, from_state):
    """From a checkpoint, and from the journal alone, though batched would be chosen now."""
    straight = ZerothOrder(toys.classifier(), methods.lozo(eps=1e-2), lr=1e-2, journal=tmp_path / "j")
    run(straight, range(2))
    state, weights = copy.deepcopy(straight.state_dict()), copy.deepcopy(straight.model.state_dict())
    records = list(Journal.open(tmp_path / "j").records())
    expected = run(straight, range(2, 5))

    model = toys.classifier()
    resumed = ZerothOrder(model, methods.lozo(eps=1e-2), lr=1e-2)
    if from_state:
        model.load_state_dict(weights)
        resumed.load_state_dict(state)
    else:
        for record in records:
            resumed.apply(record)
        resumed.run.state.prepared = True
    assert resumed.evaluator.batched is False
    with executing(Execution(clock=lambda: 0.0)):
        assert all(torch.equal(a, b) for a, b in zip(run(resumed, range(2, 5)), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), straight.model.state_dict().values(), strict=True))
    replayed = replay(toys.classifier(), tmp_path / "j")
    assert all(torch.equal(a, b) for a, b in zip(replayed.model.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_batched_run_resumed_from_its_journal_stays_batched(monkeypatch, tmp_path, request):
    straight = ZerothOrder(toys.classifier(), methods.lozo(eps=1e-2), lr=1e-2, journal=tmp_path / "j")
    run(straight, range(2))
    assert events(tmp_path / "j") == []
    request.getfixturevalue("sequential_is_faster")
    resumed = ZerothOrder(toys.classifier(), methods.lozo(eps=1e-2), lr=1e-2)
    for record in Journal.open(tmp_path / "j").records():
        resumed.apply(record)
    assert all(torch.equal(a, b) for a, b in zip(run(resumed, range(2, 4)), run(straight, range(2, 4)), strict=True))
    assert resumed.evaluator.batched and straight.evaluator.batched


def test_another_way_can_be_asked_for_on_resuming(sequential_is_faster):
    first = ZerothOrder(toys.classifier(), "lozo", lr=1e-3)
    run(first, range(1))
    second = ZerothOrder(toys.classifier(), "lozo", lr=1e-3, forward_batching="batched")
    second.load_state_dict(first.state_dict())
    run(second, range(1, 2))
    assert first.evaluator.batched is False and second.evaluator.batched


@pytest.mark.parametrize("way", ["batched", "sequential"])
@pytest.mark.parametrize(
    ("directions", "estimator", "forwards"),
    [({"directions_per": "example"}, "central", 2), ({"num_directions": 3, "directions_per": "group", "group_size": 2}, "forward", 4)],
)
def test_own_directions_in_turn_take_a_forward_of_the_batch_each(way, directions, estimator, forwards):
    """No forward of a sequential step has more rows than the batch, and no more of them than the evaluations there are."""
    model, rows = toys.classifier(), []
    optimizer = ZerothOrder(model, methods.lozo(estimator=estimator, **directions), lr=1e-3, forward_batching=way)
    run(optimizer, range(1))
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    before = optimizer.sequences_evaluated
    run(optimizer, range(1, 3))
    assert rows == ([8 * forwards] if way == "batched" else [8] * forwards) * 2
    assert optimizer.sequences_evaluated - before == sum(rows)


def test_examples_that_mix_in_a_forward_are_evaluated_alone(tmp_path):
    """A model that mixes its rows: each example by itself, written down and kept on resuming."""

    class Mixing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toys.classifier()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out = self.inner(tokens)
            return out - 0.5 * out.mean(dim=0, keepdim=True)

    model, rows = Mixing(), []
    optimizer = ZerothOrder(
        model, methods.lozo(directions_per="example", eps=1e-2), lr=1e-3, forward_batching="sequential", journal=tmp_path / "j"
    )
    run(optimizer, range(1))
    assert optimizer.evaluator.rowwise is False
    assert events(tmp_path / "j") == [{"event": "forward_batching", "batched": False, "rowwise": False}]
    again = ZerothOrder(Mixing(), methods.lozo(directions_per="example", eps=1e-2), lr=1e-3, forward_batching="sequential")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    run(again, range(1, 2))
    assert again.evaluator.rowwise is False and rows[-16:] == [1] * 16
