"""The loss that a model computes of its labels: one per example, and the same in one batch as in micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import zotune
from trainer_cases import LENGTH, config, journal_of, labelled_rows, tiny_llama, trainer
from zotune.objectives.output_gradients import recording
from zotune.optim.journal_records import StepRecord
from zotune.training.model_loss import ModelLoss

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40, "decoder_start_token_id": 0}
MIXTRAL = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}

#: name: (class, configuration, labels, whether its loss is known per example).
FAMILIES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "classifier": ("BertForSequenceClassification", {**SMALL, "num_labels": 3}, "classes", True),
    "regression": ("RobertaForSequenceClassification", {**SMALL, "num_labels": 1}, "numbers", True),
    "multi-label": ("BertForSequenceClassification", {**SMALL, "num_labels": 3}, "several", True),
    "decoder classifier": ("LlamaForSequenceClassification", {**SMALL, "num_labels": 3, "pad_token_id": 0}, "classes", True),
    "masked LM": ("BertForMaskedLM", SMALL, "tokens", True),
    "token classifier": ("BertForTokenClassification", {**SMALL, "num_labels": 40}, "tokens", True),
    "causal LM": ("LlamaForCausalLM", SMALL, "tokens", True),
    "T5": ("T5ForConditionalGeneration", T5, "tokens", True),
    "BART": ("BartForConditionalGeneration", BART, "tokens", True),
    "router loss": ("MixtralForCausalLM", MIXTRAL, "tokens", False),
    "multiple choice": ("BertForMultipleChoice", SMALL, "choices", True),
}


def family(name: str) -> nn.Module:
    kind, fields, _, _ = FAMILIES[name]
    made = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(made.config_class(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model


def rows_of(labels: str, count: int = 16) -> dict[str, Tensor]:
    """Texts of different lengths, with different numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (count, 7), generator=generator)
    mask = (torch.arange(7) < torch.randint(3, 8, (count, 1), generator=generator)).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if labels == "choices":
        batch = {name: tensor.unsqueeze(1).expand(-1, 2, -1).contiguous() for name, tensor in batch.items()}
        batch["input_ids"][:, 1] = batch["input_ids"][:, 1].flip(1)
        return {**batch, "labels": torch.randint(0, 2, (count,), generator=generator)}
    kept = (torch.rand(count, 7, generator=generator) < 0.6) & (mask > 0)
    made = {
        "classes": torch.randint(0, 3, (count,), generator=generator),
        "numbers": torch.randn(count, generator=generator),
        "several": torch.randint(0, 2, (count, 3), generator=generator).float(),
        "tokens": ids.masked_fill(~kept, -100),
    }
    return {**batch, "labels": made[labels]}


def pieces(batch: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    return [dict(zip(batch, part, strict=True)) for part in zip(*(tensor.chunk(count) for tensor in batch.values()), strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_have_the_loss_of_the_batch_of_all(name: str, tmp_path: Path) -> None:
    model, (_, _, labels, per_example) = family(name), FAMILIES[name]
    batch = rows_of(labels)
    loss = ModelLoss(zotune.ZOTrainer(model=model, args=config(tmp_path)))
    with torch.no_grad():
        whole = float(model(**batch).loss)
        for count in (1, 2, 4):
            loss_fn, parts = loss.step(pieces(batch, count))
            losses = [torch.as_tensor(loss_fn(part)) for part in parts]
            assert all(found.shape == ((16 // count,) if per_example else ()) for found in losses)
            near = 0.02 if name == "router loss" else 1e-4  # that of a router is no mean over tokens
            assert float(torch.cat([found.reshape(-1) for found in losses]).mean()) == pytest.approx(whole, rel=near)


@pytest.mark.parametrize("divided", [False, True])
def test_a_loss_divided_by_all_items_is_not_multiplied_twice(divided: bool, tmp_path: Path) -> None:
    model, batch = family("causal LM"), rows_of("tokens")
    parts, items = pieces(batch, 2), (batch["labels"][:, 1:] != -100).sum()

    def users(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return loss / (num_items_in_batch if divided else (labels[:, 1:] != -100).sum())

    loss = ModelLoss(zotune.ZOTrainer(model=model, args=config(tmp_path), compute_loss_func=users))
    with torch.no_grad():
        loss_fn, given = loss.step(parts, items)
        found = torch.stack([loss_fn(part) for part in given]).mean()
        means = torch.stack([model(**part).loss for part in parts]).mean()
        assert float(found) == pytest.approx(float(model(**batch).loss if divided else means), rel=1e-4)


def test_a_causal_models_loss_of_labels_has_output_gradients(tmp_path: Path) -> None:
    model, batch = family("causal LM"), rows_of("tokens", 4)
    loss_fn, (part,) = ModelLoss(zotune.ZOTrainer(model=model, args=config(tmp_path))).step([batch])
    states: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _module, args: states.append(args[0].detach().requires_grad_()))
    model.model(batch["input_ids"], batch["attention_mask"])
    handle.remove()
    (hidden,) = states
    logits = model.lm_head(model.model.norm(hidden))[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    with torch.no_grad(), recording() as recorder:
        loss_fn(part)
    sizes = hidden.detach().square().mean(dim=2, keepdim=True).sqrt()  # δ is that of states of size one
    expected = 4 * (sizes * hidden.grad)[:, :-1][batch["labels"][:, 1:] != -100]
    found = torch.cat([gradient[gradient.any(dim=1)] for gradient in recorder.gradients])
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()  # the norm's epsilon is not small beside these states


# --- training on tokenized data ---


def classified_rows() -> list[dict[str, Any]]:
    batch = rows_of("classes", 32)
    return [{"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": int(label)} for ids, mask, label in
            zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)]  # fmt: skip


@pytest.mark.parametrize("method", [zotune.methods.default().name, "lozo-e"])
@pytest.mark.parametrize("kind", ["causal LM", "decoder classifier"])
def test_tokenized_data_have_directions_per_example(method: str, kind: str, tmp_path: Path) -> None:
    data = {"train_dataset": labelled_rows() if kind == "causal LM" else classified_rows(), "data_collator": None}
    model = tiny_llama() if kind == "causal LM" else family(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = trainer(tmp_path, model, method=method, max_steps=2, per_device_train_batch_size=8, learning_rate=1e-3, **data)
        run.train()
    steps = [record for record in journal_of(tmp_path).records() if isinstance(record, StepRecord)]
    assert len(steps) == 2 and all(record.loss > 0 for record in steps)
    assert run.zo_optimizer.method.own


@pytest.mark.parametrize("method", [zotune.methods.default().name, "lozo-e"])
def test_a_loss_per_batch_has_directions_per_batch_and_says_so(method: str, tmp_path: Path) -> None:
    rows = [{**row, "attention_mask": [1] * LENGTH} for row in labelled_rows()]
    rows = [{name: [token % 40 if token >= 0 else token for token in ids] for name, ids in row.items()} for row in rows]
    run = trainer(tmp_path, family("router loss"), method=method, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
                  train_dataset=rows, data_collator=None, method_args={"num_directions": 2})  # fmt: skip
    with pytest.warns(UserWarning, match="one number for a batch") as caught:
        run.train()
    assert sum("one number for a batch" in str(warning.message) for warning in caught) == 1
    assert run.zo_optimizer.method.directions_per == "batch"


def test_an_objective_per_batch_has_directions_per_batch(tmp_path: Path) -> None:
    def mean_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    run = trainer(tmp_path, method="lozo-e", max_steps=1, objective=mean_loss, learning_rate=1e-3)
    with pytest.warns(UserWarning, match="one number for a batch"):
        run.train()
    assert run.zo_optimizer.method.directions_per == "batch"


def test_directions_per_example_need_a_loss_per_example(tmp_path: Path) -> None:
    def mean_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    run = trainer(tmp_path, method="lozo-e", max_steps=1, objective=mean_loss, learning_rate=1e-3, directions_per="example")
    with pytest.raises(ValueError, match="needs one loss per example"):
        run.train()
