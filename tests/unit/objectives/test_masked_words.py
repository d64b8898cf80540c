"""The loss of label words at a mask: its value for several encoders, its coefficients, what it learns, and output gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import toys
from zotune import ZerothOrder, methods, objectives
from zotune.objectives.output_gradients import recording
from zotune.optim.state import StepContext
from zotune.subspaces import residual_check
from zotune.training import schemes
from zotune.weights.structure import body_of, masked_head

MASK, WORDS = 5, (7, 11, 13)
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "albert": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "max_relative_positions": 8, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert": {"attn_implementation": "eager"},
}


def model_of(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind in ("bert", "roberta"):
            return toys.transformer(kind).eval()
        sizes = {**SIZES, **KINDS[kind], "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
        config = transformers.AutoConfig.for_model(kind, **sizes)
        return transformers.AutoModelForMaskedLM.from_config(config).float().eval()


def batch_of(size=6, length=8):
    """Rows of different lengths; the answer is told by the token behind the mask."""
    answer = torch.arange(size) % len(WORDS)
    ids = torch.randint(20, 40, (size, length), generator=torch.Generator().manual_seed(3))
    positions = (torch.arange(size) % 3 + 1).unsqueeze(1)
    ids.scatter_(1, positions, MASK).scatter_(1, positions + 1, (answer + 50).unsqueeze(1))
    mask = (torch.arange(length) < length - (torch.arange(size) % 2).unsqueeze(1)).long()
    words = torch.tensor(WORDS).expand(size, -1).contiguous()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask, "positions": positions, "option_ids": words, "answer": answer}


@pytest.mark.parametrize("kind", ["bert", "roberta", *KINDS])
def test_the_loss_is_the_cross_entropy_of_the_models_logits(kind):
    model, batch = model_of(kind), batch_of()
    with torch.no_grad():
        found = objectives.objective("mlm", model)(batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = torch.stack([logits[i, place, list(WORDS)] for i, place in enumerate(batch["positions"][:, 0].tolist())])
    assert torch.allclose(found, cross_entropy(rows, batch["answer"], reduction="none"), atol=1e-5)
    assert found.unique().numel() == len(found)


@pytest.mark.parametrize(
    ("kind", "name", "each", "scheme"),
    [
        ("bert", "lozo", "example", "full"),
        ("roberta", "mezo", "batch", "full"),
        ("albert", "lozo", "example", "full"),
        ("roberta", "mezo", "example", "lora"),
        ("bert", "mezo", "example", "head"),
        ("roberta", "mezo", "example", "bias"),
    ],
)
def test_batched_coefficients_are_the_sequential_ones(kind, name, each, scheme):
    found = []
    for how in ("batched", "sequential"):
        model = schemes.apply(model_of(kind), scheme)
        optimizer = ZerothOrder(model, methods.get(name, directions_per=each, eps=1e-2), lr=0.0, forward_batching=how)
        optimizer.step(objectives.objective("mlm", model), batch_of())
        found.append(optimizer.last_report.coefficients)
    assert len(found[0]) == (6 if each == "example" else 1) and found[0].abs().min() > 0
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "name"), [("bert", "mezo"), ("roberta", "lozo-e")])
def test_an_encoder_learns_label_words(kind, name):
    model, batch = model_of(kind), batch_of(12)
    loss = objectives.objective("mlm", model)
    optimizer = ZerothOrder(model, methods.get(name), lr="auto")
    first = float(loss(batch).mean().detach())
    for _ in range(40):
        optimizer.step(loss, batch)
    assert float(loss(batch).mean().detach()) < 0.9 * first


@pytest.mark.parametrize("kind", ["bert", "roberta", *KINDS])
def test_output_gradients_are_those_of_the_last_hidden_states(kind):
    """Through decoder, norm, activation and transform, against backpropagation; so are all positions, and the first few alone."""
    model, batch, states = model_of(kind), batch_of(), []
    loss = objectives.objective("mlm", model)
    handle = body_of(model).register_forward_hook(lambda _module, _args, output: states.append(output[0]))
    losses = loss(batch)
    handle.remove()
    (wanted,) = torch.autograd.grad(losses.sum(), states[0])
    wanted = wanted[torch.arange(6), batch["positions"][:, 0]]
    for most in (None, 4):
        with torch.no_grad(), recording(most) as recorder:
            assert torch.allclose(loss(batch), losses, atol=1e-6) and not torch.is_grad_enabled()
        assert torch.allclose(torch.cat(recorder.gradients), wanted[:most], rtol=1e-4, atol=1e-7) and not recorder.logits_differ
    assert wanted.abs().amax(dim=1).min() > 0


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_derivatives_of_the_last_layer_are_its_gradient(kind):
    """Without the norm behind its sum: what a guided step takes is the gradient within P S Vᵀ, whichever layers before it are guided."""
    model, batch = model_of(kind), batch_of()
    last = body_of(model).encoder.layer[-1].output
    last.LayerNorm = torch.nn.Identity()
    optimizer = ZerothOrder(model, methods.lozo_g(interval=2, guide=2, examples=6), lr=0.0, sample_batches=lambda _step, _count: [batch])
    loss = objectives.objective("mlm", model)
    optimizer.step(loss, batch)
    guided = {c.parameter: c for c in optimizer.output_gradients.active_coordinates}
    inside = {id(p) for p in body_of(model).parameters()}
    assert last.dense.weight in guided and all(id(parameter) in inside for parameter in guided)
    found = dict(zip(guided, optimizer.output_gradients.derivatives(StepContext(0, 1, loss, [batch])).slopes.split(4), strict=True))
    gradients = [torch.autograd.grad(each, last.dense.weight, retain_graph=True)[0] for each in loss(batch)]
    wanted = torch.stack([guided[last.dense.weight].p.T @ gradient @ guided[last.dense.weight].v for gradient in gradients])
    assert torch.allclose(found[last.dense.weight].T, wanted.flatten(1), rtol=1e-3, atol=1e-6)


def test_the_check_of_the_stream_sees_the_states_before_the_transform():
    """A change of the last layer's output arrives there as it is, without the norm behind the sum."""
    model, batch = model_of("roberta"), batch_of()
    last, loss = model.roberta.encoder.layer[-1].output, objectives.objective("mlm", model)
    last.LayerNorm = torch.nn.Identity()
    with torch.no_grad():
        found, _ = residual_check.gains({last.dense: "last"}, lambda: (loss(batch) for _ in range(1)), 64, seed=0, step=0)
    assert found["last"] == pytest.approx(1, rel=1e-3)


def test_the_masked_head_is_all_behind_the_last_hidden_states():
    assert set(masked_head(toys.transformer("roberta"))) == {
        *(f"lm_head.{name}" for name in ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias"))
    }
    assert masked_head(toys.transformer("llama")) == []
