"""Rewards of completions that llama.cpp generates: torch's completions, losses and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_models import VOCABULARY, Pair
from zotune import ZerothOrder, methods
from zotune.engines.model import EngineModel
from zotune.forward.generation import Sampling
from zotune.optim.replay import replay
from zotune.rewards import Rewards
from zotune.rewards.objective import RewardLoss

PROMPTS, NEW = 6, 6
SAMPLINGS = [
    pytest.param({}, id="greedy"),
    pytest.param({"temperature": 1.0, "top_p": 0.95, "num_samples": 3}, id="sampled"),
]


class Tokenizer:
    """Tokens as their numbers."""

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def small(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of tokens in the first third of the vocabulary."""
    return [sum(token < VOCABULARY // 3 for token in row) / len(row) for row in completion_ids]


def loss_of(model: torch.nn.Module, new: int = NEW, **sampling: Any) -> RewardLoss:
    return RewardLoss(model, Tokenizer(), Rewards([small]), Sampling(new, (5, 77), **sampling))


def batch() -> dict[str, Any]:
    ids = torch.randint(1, VOCABULARY, (PROMPTS, 7), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(7) >= torch.arange(PROMPTS).unsqueeze(1)).long()
    rows = [{"prompt": str(number), "columns": {}} for number in range(PROMPTS)]
    return {"prompt_ids": ids * mask, "prompt_mask": mask, "prompt_number": torch.arange(PROMPTS), "rows": rows}


def run(model: torch.nn.Module, steps: int, recipe: methods.Method, sampling: dict[str, Any], **options: Any) -> tuple[Any, list[Any]]:
    optimizer, loss = ZerothOrder(model, recipe, **{"lr": 0.3, "seed": 1, **options}), loss_of(model, **sampling)
    found = []
    for step in range(steps):
        value = float(optimizer.step(loss, loss.keyed(batch(), 1, step)))
        found.append((value, optimizer.last_report.coefficients.tolist()))
    return optimizer, found


def lozo() -> methods.Method:
    return dataclasses.replace(methods.lozo(interval=1, num_directions=2), eps=0.05)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_completions_and_their_rewards_are_torchs(llama: Pair, model: EngineModel, sampling: dict[str, Any]) -> None:
    found, expected = (loss.scored(loss.keyed(batch(), 0, 0)) for loss in (loss_of(model, **sampling), loss_of(llama.torch, **sampling)))
    assert found.texts == expected.texts and len(set(found.texts)) > PROMPTS // 2
    assert found.scores.total.tolist() == expected.scores.total.tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_steps_of_a_reward_are_torchs(llama: Pair, model: EngineModel, sampling: dict[str, Any]) -> None:
    _, found = run(model, 2, lozo(), sampling)
    optimizer, expected = run(llama.fresh(), 2, lozo(), sampling)
    optimizer.remove_hooks()
    assert found == expected and all(any(coefficients) for _, coefficients in found)


def test_evaluations_are_compared_by_torchs_losses_within_the_context(llama: Pair, opened) -> None:
    found, expected = loss_of(opened(llama, n_ctx=9), 3), loss_of(llama.torch, 3)  # prompts of 7 tokens
    torch.testing.assert_close(found.proxy(batch()), expected.proxy(batch()), rtol=1e-4, atol=1e-4)
    assert found(batch()).tolist() == expected(batch()).tolist()


def test_a_reward_rises_in_llama_cpp(model: EngineModel) -> None:
    before = -float(loss_of(model)(batch()).mean())
    run(model, 8, dataclasses.replace(methods.lozo(num_directions=8), eps=0.2), {}, lr=3.0)
    after = -float(loss_of(model)(batch()).mean())
    assert after > before + 0.25, (before, after)


def test_a_journal_of_rewards_replays_without_them(llama: Pair, model: EngineModel, tmp_path: Path, opened) -> None:
    run(model, 3, lozo(), {"temperature": 1.0}, journal=tmp_path / "journal.zo")
    again = opened(llama)
    replay(again, tmp_path / "journal.zo")
    found, expected = again.factors(), model.factors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))


def test_lozo_g_says_once_that_a_reward_has_no_output_gradients(model: EngineModel) -> None:
    with pytest.warns(UserWarning, match="^lozo-g: a reward has no output gradients; ") as said:
        _, found = run(model, 2, dataclasses.replace(methods.lozo_g(interval=1, layer_scales=False), eps=0.05), {})
    assert len(said) == 1 and all(any(coefficients) for _, coefficients in found)
