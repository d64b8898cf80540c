"""The laws of training hold in llama.cpp: an evaluation leaves no trace, a journal replays, a saved run continues, bit for bit."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_models import Pair, choice_batch, text_batch
from zotune import ZerothOrder, methods, objectives, replay
from zotune.engines.model import EngineModel
from zotune.methods import Method
from zotune.subspaces.coordinate import Offset

Opened = Callable[..., EngineModel]
METHODS = ["lozo", "lozo-m", "lozo-e", "lozo-g", "lozo-g-later", "agzo", "subzero"]
LENGTHS = [5, 9, 4]


def short(name: str) -> Method:
    options: dict[str, int] = {"interval": 3}
    if name.startswith("lozo-g"):
        options |= {"guide": 2, "examples": 8, "begin": int(name.endswith("later"))}
    return dataclasses.replace(methods.get(name.removesuffix("-later"), **options), eps=1e-2)


def optimizer_of(model: EngineModel, name: str = "lozo", **options: object) -> ZerothOrder:
    return ZerothOrder(model, short(name), **{"lr": 1e-2, "seed": 3, **options})


def take(optimizer: ZerothOrder, model: EngineModel, first: int, last: int) -> list[float]:
    loss = objectives.LanguageModelLoss(model)
    return [float(optimizer.step(loss, text_batch(LENGTHS, seed=step))) for step in range(first, last)]


def logits(model: EngineModel) -> Tensor:
    batch = choice_batch(LENGTHS)
    return model.scored_logits(batch, batch["positions"])


def equal(one: EngineModel, other: EngineModel) -> bool:
    first, second = one.factors(), other.factors()
    same = all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
    return bool(first) and first.keys() == second.keys() and same and torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("steps", [0, 2, 4], ids=["untrained", "trained", "folded"])
def test_an_evaluation_elsewhere_leaves_no_trace(model: EngineModel, steps: int) -> None:
    optimizer = optimizer_of(model)
    take(optimizer, model, 0, steps)
    for coordinate in optimizer.forward.coordinates if not steps else ():
        coordinate.begin_step(3, 0)
    before, states = logits(model), (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    moved = optimizer.forward.evaluate(lambda: logits(model), Offset(0.1, 3, max(0, steps - 1), 0))
    assert not torch.equal(moved, before)
    assert torch.equal(logits(model), before)

    def fail() -> None:
        logits(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.forward.evaluate(fail, Offset(0.1, 3, max(0, steps - 1), 0))
    assert torch.equal(logits(model), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


@pytest.mark.parametrize("name", METHODS)
def test_a_journal_replays_on_a_fresh_engine(llama: Pair, model: EngineModel, opened: Opened, tmp_path: Path, name: str) -> None:
    states = torch.get_rng_state()
    take(optimizer_of(model, name, journal=tmp_path / "journal.zo"), model, 0, 7)
    again = opened(llama)
    replay(again, tmp_path / "journal.zo", method=short(name))
    assert equal(model, again)
    assert torch.equal(torch.get_rng_state(), states)


@pytest.mark.parametrize(("name", "at"), [*((name, 2) for name in METHODS), ("lozo", 4), ("lozo-m", 4), ("lozo-g", 4), ("lozo-g-later", 4)])
def test_a_saved_run_continues_on_a_fresh_engine(
    llama: Pair, model: EngineModel, opened: Opened, tmp_path: Path, name: str, at: int
) -> None:
    first = optimizer_of(model, name)
    take(first, model, 0, at)
    torch.save(first.state_dict(), tmp_path / "state")
    losses = take(first, model, at, 6)
    again = opened(llama)
    second = optimizer_of(again, name)
    second.load_state_dict(torch.load(tmp_path / "state"))
    assert take(second, again, at, 6) == losses
    assert equal(model, again)


def test_measured_rate_and_eps_continue_too(llama: Pair, model: EngineModel, opened: Opened) -> None:
    first = optimizer_of(model, "lozo-e", lr="auto")
    take(first, model, 0, 4)
    state = first.state_dict()
    losses = take(first, model, 4, 7)
    again = opened(llama)
    second = optimizer_of(again, "lozo-e", lr="auto")
    second.load_state_dict(state)
    assert take(second, again, 4, 7) == losses
    assert equal(model, again)


def test_a_run_repeats_whatever_the_engine_did_before(llama: Pair, model: EngineModel, opened: Opened) -> None:
    other = opened(llama)
    warm = optimizer_of(other, "lozo-e", seed=9)
    take(warm, other, 0, 1)
    warm.remove_hooks()
    again = EngineModel(other.engine)
    losses = [take(optimizer_of(each, "lozo-g"), each, 0, 5) for each in (model, again)]
    assert losses[0] == losses[1]
    assert equal(model, again)


def test_hooks_removed_leave_the_trained_model(model: EngineModel) -> None:
    optimizer = optimizer_of(model)
    take(optimizer, model, 0, 4)
    before, factors = logits(model), model.factors()
    optimizer.remove_hooks()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(a, b) for name, sides in model.factors().items() for a, b in zip(sides, factors[name], strict=True))


def test_an_engine_is_no_base_of_another_engines_journal(
    llama: Pair, llama_q8: Pair, model: EngineModel, opened: Opened, tmp_path: Path
) -> None:
    take(optimizer_of(model, journal=tmp_path / "journal.zo"), model, 0, 1)
    with pytest.raises(ValueError, match="this model is not the one the journal starts from"):
        replay(opened(llama_q8), tmp_path / "journal.zo")
