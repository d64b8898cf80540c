"""The loss of rewarded completions, alone and in an optimizer's steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from reward_toys import NEW, PROMPTS, Tokenizer, batch, loss_of, model, share
from zotune import ZerothOrder, methods
from zotune.optim.replay import replay
from zotune.rewards import Scores


def run(
    reward: Any = share, steps: int = 3, method: str = "lozo", **options: Any
) -> tuple[LlamaForCausalLM, ZerothOrder, list[list[float]]]:
    trained = model()
    recipe = methods.get(method, **{"eps": 0.05, **options.pop("recipe", {"num_directions": 4})})
    sampling = options.pop("sampling", {})
    optimizer, found = ZerothOrder(trained, recipe, **{"lr": 0.5, **options}), []
    loss = loss_of(trained, reward, **sampling)
    for step in range(steps):
        optimizer.step(loss, loss.keyed(batch(), 0, step))
        found.append(optimizer.last_report.coefficients.tolist())
    return trained, optimizer, found


def test_the_loss_is_minus_the_mean_reward_of_a_prompt():
    seen: list[Any] = []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        seen.append((prompts, completions, completion_ids, columns))
        return [float(number) for number in range(len(prompts))]

    loss = loss_of(model(), reward, temperature=1.0, num_samples=3)
    assert loss(loss.keyed(batch(), 0, 0)).tolist() == [-1.0, -4.0, -7.0, -10.0]
    prompts, completions, ids, columns = seen[0]
    assert prompts == [f"prompt {number}" for number in range(PROMPTS) for _ in range(3)]
    assert columns == {"wanted": ["f"] * 12}
    assert completions == Tokenizer().batch_decode(ids) and len(set(completions)) > PROMPTS
    taken = loss.statistics.take()
    assert taken["reward"] == 5.5 and taken["completion_length"] == NEW and loss.statistics.take() == {}


@pytest.mark.parametrize("recipe", [{"num_directions": 4}, {"num_directions": 4, "estimator": "forward"}], ids=["central", "forward"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "num_samples": 2}], ids=["greedy", "sampled"])
def test_steps_in_one_batch_are_those_of_one_point_at_a_time(sampling, recipe):
    _, together, first = run(sampling=sampling, recipe=recipe, forward_batching="auto")
    _, alone, second = run(sampling=sampling, recipe=recipe, forward_batching="sequential")
    assert together.evaluator.batched and not alone.evaluator.batched
    assert first == second and any(any(step) for step in first)


def test_directions_per_example_act_on_their_prompt():
    _, together, first = run(method="lozo-e", recipe={"layer_scales": False})
    _, _, second = run(method="lozo-e", recipe={"layer_scales": False}, forward_batching="sequential")
    assert together.evaluator.batched and len(first[0]) == 3 * PROMPTS
    assert first == second


def test_a_small_cache_changes_no_loss():
    _, _, whole = run()
    _, _, cut = run(sampling={"kv_cache": 1})
    assert whole == cut


def test_a_failed_reward_counts_for_nothing(caplog: pytest.LogCaptureFixture):
    def without_the_first(prompts: list[str], completions: list[str], wanted: list[str], **columns: Any) -> list[float]:
        found = share(prompts, completions, wanted)
        return [float("nan") if prompt == "prompt 0" else one for prompt, one in zip(prompts, found, strict=True)]

    _, _, found = run(without_the_first, steps=1)
    assert sum("without_the_first" in record.message for record in caplog.records) == 1
    trained = model()
    loss, optimizer = loss_of(trained), ZerothOrder(trained, methods.get("lozo", eps=0.05, num_directions=4), lr=0.5)
    rest = {name: value[1:] for name, value in batch().items()}
    optimizer.step(loss, rest)
    assert found[0] == optimizer.last_report.coefficients.tolist()


def test_a_run_of_sampled_rewards_replays_without_generating(tmp_path: Path):
    trained, optimizer, _ = run(journal=tmp_path / "journal.zo", sampling={"temperature": 1.0}, recipe={"num_directions": 4, "interval": 2})
    optimizer.remove_hooks()
    again = copy.deepcopy(model())
    again.generate = None
    replay(again, tmp_path / "journal.zo").remove_hooks()
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_a_reward_rises():
    before = -float(loss_of(model())(batch()).mean())
    trained, *_ = run(steps=40, lr="auto", recipe={"num_directions": 8, "eps": 0.2})
    after = -float(loss_of(trained)(batch()).mean())
    assert after > before + 0.25, (before, after)


def test_statistics_know_which_pairs_are_the_same():
    trained = model()
    loss, optimizer = loss_of(trained), ZerothOrder(trained, methods.get("lozo", eps=1e-7, num_directions=4), lr=0.0)
    optimizer.step(loss, batch())
    assert loss.statistics.take()["identical_completions"] == 1.0
    loss, optimizer = loss_of(trained), ZerothOrder(model(), methods.get("lozo", eps=1e-7), lr=0.0)
    loss.statistics.points = 3
    loss(batch())
    assert "identical_completions" not in loss.statistics.take()
    for text in "abcab":  # θ and two points, then θ of the next step and a point
        loss.statistics.add([7], [text], np.array([1]), Scores(np.ones(1), {"one": np.ones(1)}, []))
    assert loss.statistics.take()["identical_completions"] == 0.0
    for text in "abaaa":
        loss.statistics.add([7], [text], np.array([1]), Scores(np.ones(1), {"one": np.ones(1)}, []))
    assert loss.statistics.take()["identical_completions"] == 2 / 3
