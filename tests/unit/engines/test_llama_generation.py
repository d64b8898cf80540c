"""Generation in llama.cpp gives transformers' tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_models import CONTEXT, Pair, texts
from zotune.engines.model import EngineModel

LENGTHS = [5, 1, 12, 7]


def both(llama: Pair, model: EngineModel, batch: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    config = GenerationConfig(**{"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options})
    with torch.no_grad():
        return model.generate(**batch, generation_config=config), llama.torch.generate(**batch, generation_config=config)


def test_greedy_continuations_equal_those_of_transformers(llama: Pair, model: EngineModel) -> None:
    found, expected = both(llama, model, texts(LENGTHS, left=True))
    assert torch.equal(found, expected) and found.shape == (4, 24)
    assert len(set(found[:, 12:].flatten().tolist())) > 8


def test_each_continuation_ends_with_its_first_stop(llama: Pair, model: EngineModel) -> None:
    batch = texts(LENGTHS, left=True)
    free, _ = both(llama, model, batch)
    stops = [int(free[0, 14]), int(free[2, 16])]
    found, expected = both(llama, model, batch, eos_token_id=stops)
    assert torch.equal(found, expected)
    assert (found[0, 15:] == 0).all() and int(found[0, 14]) == stops[0]
    single, same = both(llama, model, batch, eos_token_id=stops[0])
    assert torch.equal(single, same)


def test_groups_of_prompts_change_no_token(llama: Pair) -> None:
    small = llama.engine(n_ubatch=32)
    found, expected = both(llama, small, texts([20, 40, 3, 30, 2], left=True))
    assert torch.equal(found, expected)
    small.engine.close()


def test_generation_is_at_the_trained_weights(llama: Pair, model: EngineModel) -> None:
    batch, copy = texts(LENGTHS, left=True), llama.fresh()
    name = "model.layers.1.mlp.down_proj"
    left, right = (torch.randn(size, 2, generator=torch.Generator().manual_seed(size)) for size in model.engine.matrices[name])
    model.matrices[name].add(0.3 * left, 0.3 * right, 1.0)
    with torch.no_grad():
        copy.get_submodule(name).weight += 0.09 * left @ right.T
    found, expected = both(Pair(copy, llama.path), model, batch)
    assert torch.equal(found, expected)
    assert not torch.equal(found, both(llama, model, batch)[1])


def noisy(logits: np.ndarray, rows: list[int], place: int) -> np.ndarray:
    """Samples with noise that depends on the completion and the place alone."""
    noise = [np.random.default_rng([row, place]).gumbel(size=logits.shape[1]) for row in rows]
    return (logits + np.stack(noise)).argmax(axis=1)


def one_by_one(llama: Pair, prompts: list[list[int]], samples: int, stops: list[int]) -> list[list[int]]:
    """The same samples, each prompt by itself and without a cache, by torch."""
    found = []
    for number, prompt in enumerate(prompt for prompt in prompts for _ in range(samples)):
        answer: list[int] = []
        while len(answer) < 8 and not set(answer[-1:]) & set(stops):
            logits = llama.torch(torch.tensor([[*prompt, *answer]])).logits[:, -1]
            answer.append(int(noisy(logits.numpy(), [number], len(answer))[0]))
        found.append(answer)
    return found


@pytest.mark.parametrize("n_ubatch", [1024, 32])
@torch.no_grad()
def test_samples_of_a_prompt_are_those_of_torch(llama: Pair, opened: Callable[..., EngineModel], n_ubatch: int) -> None:
    prompts = [[3, 5, 8], list(range(1, 41)), [9], [7, 7, 2, 4]]
    stops = list(range(0, 90, 15))
    expected = one_by_one(llama, prompts, 3, stops)
    assert opened(llama, n_ubatch=n_ubatch).generate_tokens(prompts, 8, stops, noisy, num_samples=3) == expected
    assert len({len(answer) for answer in expected}) > 2 and len(set(map(tuple, expected))) == 12


def test_more_samples_than_sequences_are_all_there(model: EngineModel) -> None:
    def number(logits: np.ndarray, rows: list[int], place: int) -> np.ndarray:
        return np.array(rows) // (1 if place else 90) % 90

    found = model.generate_tokens([[1, 2], [3]], 2, [], number, num_samples=300)
    assert found == [[row // 90, row % 90] for row in range(600)]


def test_a_prompt_without_room_is_one_sentence(llama: Pair, model: EngineModel) -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    with pytest.raises(ValueError, match=rf"a prompt has {CONTEXT - 10} tokens, and with 12 new ones the context takes {CONTEXT}: "):
        model.generate(**texts([CONTEXT - 10, 3], left=True), generation_config=config)
    full = model.generate(**texts([CONTEXT - 11], left=True), generation_config=config)
    assert full.shape == (1, CONTEXT + 1)  # whose last token is no input


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 2, "do_sample": False}])
def test_other_than_greedy_is_refused(model: EngineModel, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="generates greedily"):
        model.generate(**texts([4]), generation_config=GenerationConfig(max_new_tokens=2, **options))
