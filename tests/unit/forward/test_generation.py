"""Generation at every point of an evaluation: the same completions as one point after the other, and as transformers' own."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from zotune import ZerothOrder
from zotune.forward.active import active
from zotune.forward.batches import BatchLayout, shared_layout
from zotune.forward.generation import NOTHING, Sampling, choose, forced_logprobs, generate
from zotune.methods.estimators import Point
from zotune.rng.gumbel import gumbel, row_keys, sample_keys
from zotune.subspaces.coordinate import Offset

VOCABULARY, STOPS, NEW, EPS = 23, (3, 7, 9, 22), 9, 0.05
POINTS = [Point(sign, k) for k in range(3) for sign in (1, -1)]


@cache
def model(kind: str = "llama") -> torch.nn.Module:
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if kind == "gpt2":
            made = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=48, **sizes))
        else:
            made = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes
                )
            )
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made.eval()


@cache
def prompts() -> tuple[Tensor, Tensor]:
    """Six prompts of one to six tokens, padded on the left."""
    ids = torch.randint(8, VOCABULARY, (6, 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) >= 5 - torch.arange(6).unsqueeze(1)).long()
    return ids * mask, mask


KEYS = row_keys(0, 0, torch.arange(6))
SAMPLINGS = [
    pytest.param(Sampling(NEW, STOPS), id="greedy"),
    pytest.param(Sampling(NEW, STOPS, temperature=1.0, num_samples=2), id="sampled"),
    pytest.param(Sampling(NEW, STOPS, temperature=0.7, top_p=0.8, top_k=9), id="truncated"),
]


def at_all_points(steps: ZerothOrder, sampling: Sampling, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Completions of all points in one batch, and of one point after the other, (points · rows, T)."""
    (ids, mask), forward = prompts(), steps.forward
    layout: BatchLayout = shared_layout(POINTS, eps, len(ids), 0, 0)
    source = layout.source
    together = forward.evaluate_batched(lambda: generate(steps.model, ids[source], mask[source], KEYS[source], sampling), layout)
    one_by_one = [
        forward.evaluate(lambda: generate(steps.model, ids, mask, KEYS, sampling), Offset(point.sign * eps, 0, 0, point.direction))
        for point in POINTS
    ]
    return together.tokens, torch.cat([each.tokens for each in one_by_one])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_completions_are_those_of_transformers(kind):
    ids, mask = prompts()
    found = generate(model(kind), ids, mask, None, Sampling(NEW, STOPS)).tokens
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=list(STOPS), pad_token_id=0)
    theirs = model(kind).generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
    width = theirs.shape[1]
    assert torch.equal(found[:, :width].clamp_min(0), theirs)
    assert (found[:, width:] == NOTHING).all()


@pytest.mark.parametrize("method", ["lozo", "subzero"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_points_together_complete_as_each_alone(kind, sampling, method):
    steps = ZerothOrder(model(kind), method, lr=1e-3)
    try:
        steps.updater.begin(0)
        together, one_by_one = at_all_points(steps, sampling)
    finally:
        steps.remove_hooks()
    assert torch.equal(together, one_by_one)
    width = 6 * sampling.num_samples
    assert (together[:width] != together[width : 2 * width]).any(), "the points were told apart"
    assert (together == NOTHING).any() and (together[:, -1] != NOTHING).any(), "some rows ended before others"


def test_members_without_perturbation_are_equal():
    steps = ZerothOrder(model(), "lozo", lr=1e-3)
    try:
        steps.updater.begin(0)
        together, _ = at_all_points(steps, Sampling(NEW, STOPS, temperature=1.0, num_samples=2), eps=0.0)
    finally:
        steps.remove_hooks()
    members = together.view(len(POINTS), 12, -1)
    assert torch.equal(members, members[:1].expand_as(members))
    assert not torch.equal(members[0, 0::2], members[0, 1::2]), "samples of a prompt differ"


def test_full_space_weights_are_made_once_a_point(monkeypatch):
    steps = ZerothOrder(model(), "mezo", lr=1e-3)
    made: list[str] = []
    coordinate = next(c for c in steps.forward.coordinates if c.name.endswith("lm_head.weight"))
    original = coordinate.at
    monkeypatch.setattr(coordinate, "at", lambda *args: (made.append("made"), original(*args))[1])
    ids, mask = prompts()
    steps.forward.evaluate(lambda: generate(steps.model, ids, mask, None, Sampling(NEW)), Offset(EPS, 0, 0, 0))
    assert len(made) == 1


def test_the_forward_has_all_rows_after_generation():
    steps = ZerothOrder(model(), "lozo", lr=1e-3)
    ids, mask = prompts()
    layout = shared_layout(POINTS, EPS, len(ids), 0, 0)

    def work() -> int:
        stacked, seen = ids[layout.source], mask[layout.source]
        generate(steps.model, stacked, seen, None, Sampling(NEW, STOPS))
        rows = active().rows
        assert forced_logprobs(steps.model, stacked, seen, stacked[:, :2], Sampling(2)).isfinite().all()
        return rows

    try:
        steps.updater.begin(0)
        assert steps.forward.evaluate_batched(work, layout) == layout.total
    finally:
        steps.remove_hooks()
    assert active().rows is None


def test_forced_logprobs_are_those_of_one_forward():
    ids, mask = prompts()
    tokens = torch.randint(8, VOCABULARY, (6, 3), generator=torch.Generator().manual_seed(2))
    found = forced_logprobs(model(), ids, mask, tokens, Sampling(3))
    whole, seen = torch.cat([ids, tokens], dim=1), torch.cat([mask, torch.ones_like(tokens)], dim=1)
    with torch.no_grad():
        logits = model()(input_ids=whole, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp_min(0)).logits
    wanted = logits[:, 5:-1].log_softmax(dim=2).gather(2, tokens.unsqueeze(2)).sum(dim=(1, 2))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_sampled_tokens_have_the_softmax_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    rows = 20_000
    found = choose(logits.expand(rows, -1).clone(), row_keys(3, 1, torch.arange(rows)), 4, Sampling(1, temperature=0.5))
    wanted = (logits / 0.5).softmax(dim=0)
    share = torch.bincount(found, minlength=4) / rows
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / rows).sqrt()).all()


def test_truncation_keeps_the_tokens_of_transformers():
    logits = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(1, temperature=1.0, top_p=0.6, top_k=7)
    warped = TopPLogitsWarper(0.6)(None, TopKLogitsWarper(7)(None, logits.clone()))
    allowed = warped.isfinite()
    found = torch.stack([choose(logits.clone(), row_keys(0, step, torch.arange(40)), 0, sampling) for step in range(200)])
    drawn = torch.zeros_like(allowed).scatter(1, found.T, True)
    assert not (drawn & ~allowed).any()
    assert drawn.sum() > 0.9 * allowed.sum()


def test_noise_is_a_function_of_row_and_place_alone():
    keys = sample_keys(row_keys(0, 0, torch.arange(5)), 2).reshape(-1)
    noise = gumbel(keys, 2, 50)
    assert torch.equal(noise[7:8], gumbel(keys[7:8], 2, 50))
    assert not torch.equal(noise, gumbel(keys, 3, 50))
    assert noise.isfinite().all() and len(noise.unique()) > 490
    state = torch.get_rng_state()
    generate(model(), *prompts(), KEYS, Sampling(3, temperature=1.0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"num_samples": 2}, "set a temperature"),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**{"max_new_tokens": 4, **changes})


@pytest.mark.parametrize("kind", ["prefix", "prompt", "lora"])
def test_adapters_complete_as_a_forward_of_the_whole_text(kind):
    options: dict = {"task_type": "CAUSAL_LM"} | ({"r": 2} if kind == "lora" else {"num_virtual_tokens": 3})
    config = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig, "lora": LoraConfig}[kind](**options)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        adapted = get_peft_model(copy.deepcopy(model()), config).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.7)
    ids, mask = prompts()
    found = generate(adapted, ids, mask, None, Sampling(4)).tokens
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        text = ids[row : row + 1, ids.shape[1] - length :]
        for token in found[row].tolist():
            with torch.no_grad():
                assert int(adapted(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, -1].argmax()) == token
            text = torch.cat([text, torch.tensor([[token]])], dim=1)
    assert not torch.equal(found, generate(model(), ids, mask, None, Sampling(4)).tokens)
