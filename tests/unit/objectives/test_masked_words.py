"""The loss of label words at a mask: its value for several encoders, its coefficients, what it learns, and output gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import toys
from zotune import ZerothOrder, methods, objectives
from zotune.weights.structure import masked_head

MASK, WORDS = 5, (7, 11, 13)
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "albert": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "max_relative_positions": 8, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert": {"attn_implementation": "eager"},
}


def model_of(kind):
    if kind in ("bert", "roberta"):
        return toys.transformer(kind).eval()
    config = transformers.AutoConfig.for_model(kind, **({**SIZES, **KINDS[kind], "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
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


@pytest.mark.parametrize("each", ["example", "batch"])
@pytest.mark.parametrize(("kind", "name"), [("bert", "lozo"), ("roberta", "mezo")])
def test_batched_coefficients_are_the_sequential_ones(kind, name, each):
    found = []
    for how in ("batched", "sequential"):
        model = toys.transformer(kind)
        optimizer = ZerothOrder(model, methods.get(name, directions_per=each, eps=1e-2), lr=0.0, forward_batching=how)
        optimizer.step(objectives.objective("mlm", model), batch_of())
        found.append(optimizer.last_report.coefficients)
    assert len(found[0]) == (6 if each == "example" else 1) and found[0].abs().min() > 0
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "name"), [("bert", "mezo"), ("roberta", "lozo-e")])
def test_an_encoder_learns_label_words(kind, name):
    model, batch = toys.transformer(kind), batch_of(12)
    loss = objectives.objective("mlm", model)
    optimizer = ZerothOrder(model, methods.get(name), lr="auto")
    first = float(loss(batch).mean().detach())
    for _ in range(40):
        optimizer.step(loss, batch)
    assert float(loss(batch).mean().detach()) < 0.9 * first


@pytest.mark.parametrize("objective", ["mlm", "choices"])
def test_lozo_g_says_that_it_takes_drawn_directions(objective):
    """Both losses: over label words, and the same scores as options, which would record output gradients behind the transform."""
    model = toys.transformer("roberta")
    optimizer = ZerothOrder(model, methods.lozo_g(interval=2), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.step(objectives.objective(objective, model), batch_of())
            assert not any(getattr(c, "guided", False) for c in optimizer.forward.coordinates)
    said = [str(each.message) for each in caught if "masked language model" in str(each.message)]
    assert len(said) == 1 and said[0].endswith("drawn directions train the weights, as in lozo-e.")


def test_the_masked_head_is_all_behind_the_last_hidden_states():
    assert set(masked_head(toys.transformer("roberta"))) == {
        *(f"lm_head.{name}" for name in ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias"))
    }
    assert masked_head(toys.transformer("llama")) == []
