"""Schemes: each trains exactly the parameters it says, adapters start as they should, and what makes no sense is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import zotune
from trainer_cases import StopAt, choice_rows, same_weights, tiny_llama, trainer, weights
from zotune import baselines, methods
from zotune.objectives.token_logprobs import scored_logits
from zotune.training import schemes
from zotune.training.schemes import Scheme, apply, refusal

pytest.importorskip("peft")


def llama(tied: bool = False, kv_heads: int = 4, **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def bert() -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=2)
        )


CASES = {
    "full": (Scheme(), lambda name: True),
    "pattern": (Scheme(trainable=[r"layers\.1\.", "norm.weight$"]), lambda name: "layers.1." in name or name.endswith("norm.weight")),
    "head": (Scheme("head"), lambda name: name == "lm_head.weight"),
    "bias": (Scheme("bias"), lambda name: name.endswith("bias")),
    "lora": (Scheme("lora", lora_r=2, lora_target_modules=["q_proj", "down_proj"]), lambda name: "lora_" in name),
    "prefix": (Scheme("prefix", num_virtual_tokens=3), lambda name: "prompt_encoder" in name),
    "prompt": (Scheme("prompt", num_virtual_tokens=3), lambda name: "prompt_encoder" in name),
}


@pytest.mark.filterwarnings("ignore:no batched evaluation")
@pytest.mark.parametrize("method", ["mezo", "fo-adamw"])
@pytest.mark.parametrize("name", CASES)
def test_a_scheme_moves_what_it_says_and_nothing_else(name: str, method: str, tmp_path: Path) -> None:
    scheme, moves = CASES[name]
    model = apply(llama(tied=name == "head", attention_bias=True), scheme, seed=1)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {key for key in before if moves(key)}
    with torch.no_grad():  # LoRA's A gets no gradient while B is 0
        for key, p in model.named_parameters():
            if "lora_B" in key:
                before[key] = p.add_(0.1).clone()
    trainer(tmp_path, model, method=method, learning_rate=1e-1 if method == "mezo" else 1e-2).train()
    after = dict(model.named_parameters())
    # A bias that the softmax of attention takes out of every score stays as it is under a gradient.
    changed = {key for key in before if not torch.equal(before[key], after[key]) or (method != "mezo" and "k_proj.bias" in key)}
    assert changed >= {key for key in before if moves(key)}
    assert all(torch.equal(before[key], after[key]) for key in before if not moves(key))


def test_an_untied_head_keeps_the_function_and_is_saved(tmp_path: Path) -> None:
    model = llama(tied=True)
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits.detach()
    apply(model, "head")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same_weights(weights(model), weights(loaded))
    assert torch.equal(loaded.lm_head.weight, 2 * loaded.model.embed_tokens.weight)


def test_lora_on_all_linear_layers_but_the_head() -> None:
    model = apply(llama(), "lora", lora_r=2, lora_target_modules=["all-linear"])
    adapted = {key.partition(".lora_A")[0] for key, _ in model.named_parameters() if ".lora_A" in key}
    linear = {f"base_model.model.{key}" for key, layer in llama().named_modules() if isinstance(layer, torch.nn.Linear)}
    assert adapted == linear - {"base_model.model.lm_head"} and len(adapted) == 14


def test_a_classifiers_head() -> None:
    model = apply(bert(), "head")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_prefix_is_what_the_model_makes_of_real_tokens(kv_heads: int) -> None:
    """Behind the prefix a text is scored as behind the tokens that the prefix was made of."""
    model = llama(kv_heads=kv_heads).eval()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tokens = schemes.real_tokens(model, 4)
    text = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        whole = model(torch.cat([tokens.expand(2, -1), text], dim=1)).logits[:, 4:]
        keys = model(tokens, use_cache=True).past_key_values.layers
    prefixed = apply(model, "prefix", num_virtual_tokens=4, seed=7).eval()
    table = prefixed.prompt_encoder["default"].embedding.weight.detach().view(4, 2, 2, kv_heads, 8)
    for layer in range(2):
        assert torch.equal(table[:, layer, 0], keys[layer].keys[0].transpose(0, 1))
        assert torch.equal(table[:, layer, 1], keys[layer].values[0].transpose(0, 1))
    with torch.no_grad():
        behind = prefixed(input_ids=text, attention_mask=mask).logits
    assert torch.allclose(behind[mask.bool()], whole[mask.bool()], atol=1e-5)


def test_a_soft_prompt_starts_from_embeddings_and_shifts_scores() -> None:
    model = llama().eval()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tokens = schemes.real_tokens(model, 4)
    text = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    positions = torch.tensor([[0, 3], [1, 2]])
    with torch.no_grad():
        whole = model(torch.cat([tokens.expand(2, -1), text], dim=1)).logits
        expected = torch.stack([whole[row, 4 + positions[row]] for row in range(2)])
        prompted = apply(model, "prompt", num_virtual_tokens=4, seed=7).eval()
        found = scored_logits(prompted, {"input_ids": text, "attention_mask": mask}, positions)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
def test_an_adapter_starts_from_its_seed_alone(scheme: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = apply(llama(), scheme, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = apply(llama(), scheme, seed=1), apply(llama(), scheme, seed=2)
    assert same_weights(weights(one), weights(again))
    assert not same_weights(weights(one), weights(other))


@pytest.mark.filterwarnings("ignore:no batched evaluation")
@pytest.mark.parametrize("method", ["mezo", "fo-adamw"])
@pytest.mark.parametrize("scheme", ["prefix", "prompt", "head"])
def test_a_run_resumes_bit_for_bit_and_its_adapter_loads(scheme: str, method: str, tmp_path: Path) -> None:
    def start(seed: int = 0) -> torch.nn.Module:
        return apply(llama(tied=True), Scheme(scheme), seed=seed)

    run = {"max_steps": 8, "lr_scheduler_type": "linear", "train_dataset": choice_rows(40), "method": method}
    saving = {**run, "save_strategy": "steps", "save_steps": 3}
    straight = trainer(tmp_path / "straight", start(), **run)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "resumed", start(), callbacks=[StopAt(5)], **saving).train()
    resumed = trainer(tmp_path / "resumed", start(seed=5), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model))
    if scheme != "head":
        resumed.save_model(tmp_path / "saved")
        assert not (tmp_path / "saved/model.safetensors").exists()
        loaded = schemes.load_adapter(llama(tied=True), tmp_path / "saved")
        assert same_weights(weights(loaded), weights(resumed.model))
        if method == "mezo":
            base = schemes.load_adapter(llama(tied=True), tmp_path / "resumed/initial_adapter")
            zotune.replay(base, tmp_path / "resumed/journal.zo").remove_hooks()
            assert same_weights(weights(base), weights(resumed.model))


def test_lora_takes_batched_forwards_and_a_direction_per_example(tmp_path: Path) -> None:
    losses = []
    for forward_batching in ("batched", "sequential"):
        run = trainer(
            tmp_path / forward_batching, apply(tiny_llama(), "lora"), method="lozo-e", forward_batching=forward_batching, learning_rate=1e-2
        )
        run.train()
        assert run.zo_optimizer.evaluator.batched is (forward_batching == "batched")
        losses.append(run.zo_optimizer.last_report.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "scheme", "reason"),
    [
        (methods.lozo(), Scheme("bias"), "trains vectors only: choose a method in full space"),
        (methods.lozo(rank=4), Scheme("lora", lora_r=4), "larger than that .* or a smaller --rank"),
        (methods.mezo(), Scheme("lora", lora_dropout=0.1), "lora_dropout acts in training mode"),
        (baselines.scale(), Scheme("bias"), "normalizes the columns of matrices"),
        (baselines.galore(), Scheme("bias"), "both sides above its rank 4"),
        (baselines.mkor(), Scheme("prompt"), "no Linear layer"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(method: Any, scheme: Scheme, reason: str) -> None:
    model = apply(llama(attention_bias=True), scheme)
    said = refusal(method, model, scheme)
    assert said is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(said)


def test_what_makes_sense_is_not_refused() -> None:
    for name in methods.names():
        method = methods.get(name, **({"rank": 1} if "rank" in methods.options(name) else {}))  # a model this small has no room for 64
        for scheme in (Scheme(), Scheme("lora"), Scheme("prefix"), Scheme("head")):
            assert refusal(method, apply(llama(), scheme), scheme) is None, (name, scheme)
    for name in baselines.names():
        for scheme in (Scheme(), Scheme("lora"), Scheme("head")):
            reason = refusal(baselines.get(name), apply(llama(), scheme), scheme)
            if (name, scheme.scheme) == ("hybrid", "head"):
                assert reason is not None and "leaves none before them" in reason
            else:
                assert reason is None, (name, scheme)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme("lorra"), "unknown scheme 'lorra'"),
        (lambda: Scheme("lora", lora_r=0), "lora_r must be at least 1"),
        (lambda: Scheme("full", lora_r=4), "--lora_r is an option of --scheme lora, not of full"),
        (lambda: Scheme("lora", trainable=["q"]), "--trainable is an option of --scheme full"),
        (lambda: Scheme(trainable=["("]), "not a regular expression"),
        (lambda: apply(llama(), "full", trainable=["nothing"]), "matches no parameter; names are such as"),
        (lambda: apply(llama(), "bias"), "has no bias"),
        (lambda: apply(llama(), "lora", rank=3), "unknown option 'rank' of a scheme"),
        (lambda: apply(bert(), "prompt"), "is for causal language models"),
        (lambda: apply(torch.nn.Linear(2, 2), "head"), "has no head"),
    ],
)
def test_wrong_requests_name_the_fix(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_encoder_without_a_head_takes_lora_but_no_prefix() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = BertModel(config, add_pooling_layer=False)
        with pytest.raises(ValueError, match="this is a BertModel: choose lora or full"):
            apply(encoder, Scheme("prompt"))
        model = apply(encoder, Scheme("lora"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    ids = torch.arange(24).view(4, 6)
    optimizer = zotune.ZerothOrder(model, "mezo", lr=1e-2)
    loss = optimizer.step(lambda ids: model(input_ids=ids).last_hidden_state.square().mean(dim=(1, 2)), ids)
    assert torch.isfinite(loss)
