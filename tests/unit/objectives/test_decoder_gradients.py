"""Output gradients behind an encoder: those of the decoder's states, and steps that train the decoder's layers along them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from zotune import ZerothOrder, methods, objectives
from zotune.objectives.label_losses import LabelLoss
from zotune.objectives.output_gradients import recording
from zotune.optim.state import StepContext
from zotune.weights.structure import decoder_of, head_of

ROWS, TARGETS, VOCABULARY = 8, 5, 40


def model_of(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "t5":
            sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
            return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)).eval()
        sizes = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in (("layers", 2), ("attention_heads", 2))}
        sizes |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.2}
        return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes)).eval()


def batch_of(inputs: int = 9) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(3, VOCABULARY, (ROWS, size), generator=draw) for size in (inputs, TARGETS))
    targets[::2, 3:] = -100
    begun = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), targets[:, :-1].clamp_min(0)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": begun, "targets": targets}


def steps_of(model: nn.Module, batch: dict[str, Tensor], lr: float | str = 0.0) -> ZerothOrder:
    method = methods.lozo_g(interval=20, guide=3, examples=ROWS)
    return ZerothOrder(model, method, lr=lr, sample_batches=lambda _step, _count: [batch])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_they_are_the_gradients_in_the_decoders_last_states(kind: str) -> None:
    """Behind T5's final norm times the states' root mean squares, and without the constant by which it multiplies what the head gets."""
    model, batch, states = model_of(kind), batch_of(), []
    last, scale = (model.decoder.final_layer_norm, model.model_dim**0.5) if kind == "t5" else (head_of(model), 1.0)
    loss = objectives.objective("seq2seq", model)
    handle = last.register_forward_pre_hook(lambda _module, args: states.append(args[0]))
    losses = loss(batch)
    handle.remove()
    (wanted,) = torch.autograd.grad(losses.sum(), states)
    if kind == "t5":
        wanted = wanted * states[0].detach().square().mean(dim=2, keepdim=True).sqrt() * scale
    scored = batch["targets"] >= 0
    with torch.no_grad(), recording(None) as recorder:
        loss(batch)
    assert torch.allclose(torch.cat(recorder.gradients).view_as(wanted), wanted * scored.unsqueeze(2), rtol=1e-3, atol=1e-5)
    with torch.no_grad(), recording(64) as recorder:
        assert torch.allclose(loss(batch), losses, atol=1e-6)
    assert torch.allclose(torch.cat(recorder.gradients), wanted[scored], rtol=1e-3, atol=1e-5) and not recorder.logits_differ

    labels = LabelLoss(model, "token")
    (prepared,) = labels.batches([{**{name: batch[name] for name in batch if name != "targets"}, "labels": batch["targets"]}])
    share = ROWS / int(scored.sum()) * scored.sum(dim=1)  # the mean over tokens, of losses that were means over an example's
    with torch.no_grad(), recording(64) as recorder:
        assert torch.allclose(labels(prepared), losses * share, rtol=1e-5)
    assert torch.allclose(torch.cat(recorder.gradients), (wanted * share.view(-1, 1, 1))[scored], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inputs", [9, TARGETS])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_decoders_layers_that_write_to_its_stream_are_guided(kind: str, inputs: int) -> None:
    """None of the encoder's, also where its texts are as long as the decoder's; queries of the cross-attention are found out."""
    model, batch = model_of(kind), batch_of(inputs)
    steps = steps_of(model, batch)
    steps.step(objectives.objective("seq2seq", model), batch)
    writing = {"t5": (".o.weight", ".wo.weight"), "bart": ("out_proj.weight", "fc2.weight")}[kind]
    inside = {id(p) for p in decoder_of(model).parameters()}  # type: ignore[union-attr]
    wanted = {name for name, p in model.named_parameters() if id(p) in inside and name.endswith(writing)}
    assert {c.name for c in steps.output_gradients.active_coordinates} == wanted and len(wanted) == 6
    rejected = steps.output_gradients.rejected
    assert len(rejected) == 2 and all(name.endswith(("EncDecAttention.q.weight", "encoder_attn.q_proj.weight")) for name in rejected)


def test_derivatives_of_the_last_layer_are_its_gradient() -> None:
    """Without the norm behind it: what a guided step takes is the gradient within P S Vᵀ."""
    model, batch = model_of("t5"), batch_of()
    model.decoder.final_layer_norm = nn.Identity()
    steps, loss = steps_of(model, batch), objectives.objective("seq2seq", model)
    steps.step(loss, batch)
    last = model.decoder.block[-1].layer[-1].DenseReluDense.wo.weight
    active = steps.output_gradients.active_coordinates
    parts = steps.output_gradients.derivatives(StepContext(0, 1, loss, [batch])).slopes.split([c.num_guided for c in active])
    coordinate, found = next((c, part) for c, part in zip(active, parts, strict=True) if c.parameter is last)
    gradients = [torch.autograd.grad(each, last, retain_graph=True)[0] for each in loss(batch)]
    wanted = torch.stack([coordinate.p.T @ gradient @ coordinate.v for gradient in gradients])
    scale = model.model_dim**-0.5 if model.config.tie_word_embeddings else 1.0  # T5 scales the states in front of a tied head
    assert torch.allclose(scale * found.T, wanted.flatten(1), rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*several weights at once")
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_toy_is_learned(kind: str) -> None:
    model, batch = model_of(kind), batch_of()
    loss = objectives.objective("seq2seq", model)
    with torch.no_grad():
        before = float(loss(batch).mean())
    steps = steps_of(model, batch, "auto")
    for _ in range(100):
        steps.step(loss, batch)
    with torch.no_grad():
        assert float(loss(batch).mean()) < 0.75 * before


@pytest.mark.filterwarnings("ignore:.*several weights at once")
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_batched_coefficients_are_the_sequential_ones(kind: str) -> None:
    """Where a direction has two rows: T5's bias of positions has one for all rows of a direction."""
    found, batch = [], batch_of()
    for together in (True, False):
        model = model_of(kind)
        method = methods.lozo_e(num_directions=1, directions_per="group", group_size=2, eps=1e-2)
        optimizer = ZerothOrder(model, method, lr=0.0, forward_batching="batched" if together else "sequential")
        if not together:
            optimizer.evaluator.restore(False, False)  # one direction after the other
        optimizer.step(objectives.objective("seq2seq", model), batch)
        assert optimizer.evaluator.rowwise is together
        found.append(optimizer.last_report.coefficients)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3) and found[0].abs().min() > 0
