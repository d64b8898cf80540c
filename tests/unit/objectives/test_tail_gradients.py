"""Output gradients of classifiers: those of the last block's states at the positions that the classifier reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from family_cases import save_media_model
from zotune import ZerothOrder, methods, objectives
from zotune.objectives import tail_gradients
from zotune.objectives.label_losses import LabelLoss
from zotune.objectives.output_gradients import recording
from zotune.optim.state import StepContext
from zotune.subspaces import residual_check
from zotune.weights.structure import last_block

ROWS, LENGTH, CLASSES, WIDTH = 6, 7, 3, 16
BERT = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 16}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "first", BERT),
    "roberta": ("RobertaConfig", "first", BERT),
    "distilbert": ("DistilBertConfig", "first", {"dim": WIDTH, "hidden_dim": 24, "n_layers": 3, "n_heads": 2}),
    "llama": ("LlamaConfig", "last", BERT),
    "gpt2": ("GPT2Config", "last", {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "n_positions": 16}),
}
OPTIONS = {"vocab_size": 30, "pad_token_id": 0, "num_labels": CLASSES, "initializer_range": 0.3}


def model_of(kind: str, head: str = "SequenceClassification", **options: Any) -> Any:
    config = getattr(transformers, KINDS[kind][0])(**{**KINDS[kind][2], **OPTIONS, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()


def batch_of(labels: Tensor | None = None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 30, (ROWS, LENGTH), generator=draw), torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[::2, 5:] = 0
    labels = torch.randint(0, CLASSES, (ROWS,), generator=draw) if labels is None else labels
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def by_autograd(model: Any, loss: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(losses, their sum's gradient in the last block's output)."""
    states: list[Tensor] = []
    block = last_block(model)
    assert block is not None
    handle = block.register_forward_hook(lambda _m, _a, output: states.append(output[0] if isinstance(output, tuple) else output))
    losses = loss(batch)
    handle.remove()
    return losses.detach(), torch.autograd.grad(losses.sum(), states)[0]


def recorded(loss: Any, batch: dict[str, Tensor], most: int | None = 64) -> Tensor:
    with torch.no_grad(), recording(most) as recorder:
        loss(batch)
        assert not torch.is_grad_enabled()
    return torch.cat(recorder.gradients) if recorder.gradients else torch.empty(0)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_gradients_at_the_positions_that_are_read(kind: str) -> None:
    model, batch = model_of(kind), batch_of()
    loss = objectives.objective("classifier", model)
    losses, wanted = by_autograd(model, loss, batch)
    places = {"first": torch.zeros(ROWS, dtype=torch.long), "last": batch["attention_mask"].sum(dim=1) - 1}[KINDS[kind][1]]
    wanted = wanted[torch.arange(ROWS), places]
    for most in (None, 4):
        assert torch.allclose(recorded(loss, batch, most), wanted[:most], rtol=1e-4, atol=1e-7)
    with torch.no_grad(), recording(64):
        assert torch.allclose(loss(batch), losses, atol=1e-6)
        (prepared,) = (labels := LabelLoss(model, "example")).batches([batch])
        assert torch.allclose(labels(prepared), losses, atol=1e-6)
    assert torch.allclose(recorded(labels, prepared), wanted, rtol=1e-4, atol=1e-7) and wanted.abs().amax(dim=1).min() > 0


@pytest.mark.parametrize(
    ("outputs", "labels"), [(1, torch.linspace(-1, 1, ROWS)), (CLASSES, torch.rand(ROWS, CLASSES, generator=torch.Generator()).round())]
)
def test_of_numbers_and_of_several_labels(outputs: int, labels: Tensor) -> None:
    model, batch = model_of("bert", num_labels=outputs), batch_of(labels)
    loss = objectives.objective("classifier", model)
    assert torch.allclose(recorded(loss, batch), by_autograd(model, loss, batch)[1][:, 0], rtol=1e-4, atol=1e-7)


def test_of_words() -> None:
    model, batch = model_of("roberta", "TokenClassification"), batch_of()
    batch |= {"positions": torch.tensor([[0, 2, 4]] * 3 + [[1, 3, 0]] * 3), "targets": torch.tensor([[0, 2, 1]] * 3 + [[1, 0, -100]] * 3)}
    loss = objectives.objective("token-classes", model)
    _, wanted = by_autograd(model, loss, batch)
    rows = torch.arange(ROWS).unsqueeze(1)
    scored = batch["targets"] >= 0
    assert torch.allclose(recorded(loss, batch), wanted[rows, batch["positions"]][scored], rtol=1e-4, atol=1e-7)
    everywhere = recorded(loss, batch, None).view(ROWS, 3, WIDTH)
    assert torch.allclose(everywhere, wanted[rows, batch["positions"]] * scored.unsqueeze(2), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["contrastive", "similarity"])
def test_of_sentence_embeddings(name: str) -> None:
    """Of one loss for the batch, and of one for each pair, whose two texts are rows of their own."""
    config = transformers.BertConfig(**BERT, **OPTIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
    one = batch_of()
    batch = {key: one[key].view(3, 2, LENGTH) for key in ("input_ids", "attention_mask")} | {"score": torch.tensor([0.2, 0.9, 0.5])}
    batch["pooled"] = batch["attention_mask"].clone()
    batch["pooled"][..., 0] = 0
    loss = objectives.objective(name, model)
    losses, wanted = by_autograd(model, loss, batch)
    with torch.no_grad(), recording(None) as recorder, recorder.following():
        returned = loss(batch)
        assert returned.shape == losses.shape and bool(recorder.end_call(returned).all())
    found, pooled = torch.cat(recorder.gradients).view(ROWS, LENGTH, WIDTH), batch["pooled"].view(ROWS, LENGTH, 1)
    assert torch.allclose(found, wanted * pooled, rtol=1e-4, atol=1e-7) and bool(found.any())
    pairs = torch.arange(ROWS) // 2 if name == "similarity" else torch.zeros(ROWS, dtype=torch.long)
    assert torch.equal(torch.cat(recorder.examples), pairs.repeat_interleave(LENGTH)) and recorder.num_examples == int(pairs.max()) + 1


class MeanOfStates(transformers.BertForSequenceClassification):
    """Reads the mean of all real states, or a state in the middle."""

    middle = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_options: Any) -> Any:  # type: ignore[override]
        states = self.bert(input_ids, attention_mask).last_hidden_state
        share = attention_mask / attention_mask.sum(dim=1, keepdim=True)
        return {"logits": self.classifier(states[:, 2] if self.middle else (share.unsqueeze(2) * states).sum(dim=1))}.values()


class Named:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("middle", [False, True])
def test_a_classifier_that_reads_elsewhere_has_none(middle: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MeanOfStates(transformers.BertConfig(**BERT, **OPTIONS)).eval()
    model.middle, batch = middle, batch_of()
    forward = model.forward
    model.forward = lambda **inputs: Named(next(iter(forward(**inputs))))  # type: ignore[method-assign]
    loss = objectives.objective("classifier", model)
    _, wanted = by_autograd(model, loss, batch)
    found = recorded(loss, batch)
    assert (not found.numel()) if middle else torch.allclose(found, wanted[batch["attention_mask"] > 0], rtol=1e-4, atol=1e-7)


def test_positions_that_change_are_found_out() -> None:
    model, batch = model_of("bert"), batch_of()
    loss = objectives.objective("classifier", model)
    assert recorded(loss, batch).numel()
    tail_gradients._reads[model] = "last"  # as if the first batch had said so
    assert not recorded(loss, batch).numel() and not recorded(loss, batch).numel()


def test_derivatives_of_the_last_layer_are_its_gradient() -> None:
    """Also behind a final norm: what a guided step takes is the gradient within P S Vᵀ."""
    model, batch = model_of("llama"), batch_of()
    loss = objectives.objective("classifier", model)
    steps = ZerothOrder(model, methods.lozo_g(interval=2, guide=2, examples=6), lr=0.0, sample_batches=lambda _step, _count: [batch])
    steps.step(loss, batch)
    last = model.model.layers[-1].mlp.down_proj.weight
    active = steps.output_gradients.active_coordinates
    assert {c.name.rpartition("layers.")[2] for c in active} == {
        f"{i}.{name}.weight" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    parts = steps.output_gradients.derivatives(StepContext(0, 1, loss, [batch])).slopes.split([c.num_guided for c in active])
    coordinate, found = next((c, part) for c, part in zip(active, parts, strict=True) if c.parameter is last)
    gradients = [torch.autograd.grad(each, last, retain_graph=True)[0] for each in loss(batch)]
    wanted = torch.stack([coordinate.p.T @ gradient @ coordinate.v for gradient in gradients])
    places = batch["attention_mask"].sum(dim=1) - 1
    assert places.min() < LENGTH - 1  # padding behind some
    assert torch.allclose(found.T, wanted.flatten(1), rtol=1e-3, atol=1e-6)


def test_layers_that_norms_hide_from_an_encoders_head_are_not_guided() -> None:
    gains = {"0": 0.02, "1": 0.05, "2": 0.4, "3": 0.9}

    def rejected(encoder: bool, found: dict[str, float]) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(residual_check, "gains", lambda *_args: (found, []))
            layers = {nn.Identity(): name for name in found}
            return residual_check.verify(layers, lambda: iter(()), 1, 0, 0, encoder=encoder).rejected

    assert rejected(True, gains) == ["0", "1"] and rejected(False, gains) == list(gains)
    assert rejected(True, dict.fromkeys(gains, -0.1)) == list(gains)
    assert rejected(True, {"0": 0.5, "1": 0.6, "2": 0.4, "3": 0.9}) == []


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_toy_is_learned(kind: str) -> None:
    model, batch = model_of(kind), batch_of()
    loss = objectives.objective("classifier", model)
    with torch.no_grad():
        before = float(loss(batch).mean())
    method = methods.lozo_g(interval=20, guide=3, examples=ROWS)
    steps = ZerothOrder(model, method, lr="auto", sample_batches=lambda _step, _count: [batch])
    for _ in range(60):
        steps.step(loss, batch)
    with torch.no_grad():
        assert float(loss(batch).mean()) < 0.5 * before


def test_one_loss_of_a_batch_counts_its_examples() -> None:
    """The measured distance grows with √N of the batch's N examples, whether the loss is one number or one for each."""
    found = []
    for one in (False, True):
        model = model_of("bert")
        loss = objectives.objective("classifier", model)
        method = methods.lozo_g(interval=20, guide=3, examples=ROWS)
        steps = ZerothOrder(model, method, lr="auto", sample_batches=lambda _step, _count: [batch_of()])
        steps.step((lambda batch, loss=loss: loss(batch).mean()) if one else loss, batch_of())
        found.append(steps.output_gradients.distance.value)
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=0.2)  # the curvature's error is of single losses


@pytest.mark.parametrize("name", ["vit", "ast", "w2v", "w2v, padded"])
def test_of_images_and_sound(name: str, tmp_path: Path) -> None:
    """Where there are no tokens, at the positions of the last block's states, as many as the rows' shape gives."""
    kind, padded = name.partition(",")[0], "padded" in name
    save_media_model(tmp_path, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loader = transformers.AutoModelForImageClassification if kind == "vit" else transformers.AutoModelForAudioClassification
        model = loader.from_pretrained(tmp_path, num_labels=CLASSES).eval()
    draw, shapes = torch.Generator().manual_seed(1), {"vit": (3, 16, 16), "ast": (24, 16), "w2v": (800,)}
    inputs = torch.randn(ROWS, *shapes[kind], generator=draw)
    batch = {model.main_input_name: inputs, "labels": torch.arange(ROWS) % CLASSES}
    if padded:
        batch["attention_mask"] = torch.ones(ROWS, 800, dtype=torch.long)
        batch["attention_mask"][::2, 480:] = 0
        batch["input_values"] = inputs * batch["attention_mask"]
    loss = objectives.objective("media", model)
    losses, wanted = by_autograd(model, loss, batch)
    with torch.no_grad():
        assert float(losses.mean()) == pytest.approx(float(model(**batch).loss), abs=1e-5)
    if kind == "vit":
        wanted = wanted[:, :1]
    assert wanted.abs().amax(dim=(1, 2)).min() > 0
    assert torch.allclose(recorded(loss, batch).view(ROWS, -1, WIDTH), wanted, rtol=1e-4, atol=1e-7)
    longer = {**batch, "input_values": torch.cat([inputs, inputs], dim=1)} if name == "w2v" else batch  # other shapes, other lengths
    found = recorded(loss, longer).view(ROWS, -1, WIDTH)
    assert torch.allclose(found, by_autograd(model, loss, longer)[1][:, : found.shape[1]], rtol=1e-4, atol=1e-7)
