"""ZOTrainer: forward-only steps, logging and evaluation under Hugging Face's loop."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback, TrainingArguments

import toys
import zotune
from trainer_cases import (
    accuracy,
    choice_rows,
    collate_choices,
    collate_completions,
    config,
    journal_of,
    labelled_rows,
    losses,
    same_weights,
    tiny_llama,
    trainer,
    weights,
)
from zotune.objectives.losses import ChoiceLoss, choice_scores
from zotune.optim.journal_records import StepRecord


@pytest.mark.parametrize("method", toys.names())
@pytest.mark.filterwarnings("ignore:this model.s attention kernel:UserWarning")  # forward-grad says so once
def test_every_trainable_parameter_moves_and_no_gradient_exists(method: str, tmp_path: Path) -> None:
    anchored = {"method_args": {"anchor_batches": 2}} if "anchor_batches" in zotune.methods.options(method) else {}
    run = trainer(tmp_path, method=method, learning_rate=1e-5, **anchored)
    run.model.model.norm.weight.requires_grad = False
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_the_loss_falls_and_accuracy_rises(tmp_path: Path) -> None:
    run = trainer(tmp_path, method="lozo", learning_rate=1e-3, max_steps=300, logging_steps=50,
                  eval_dataset=choice_rows(), compute_metrics=accuracy)  # fmt: skip
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.08
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.1
    assert losses(run)[-1][1] < losses(run)[0][1]


def test_what_is_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, logging_steps=3, gradient_accumulation_steps=2, num_directions=2)
    run.train()
    (first, second) = [entry for entry in run.state.log_history if "loss" in entry]
    assert first["step"] == 3 and second["step"] == 6
    records = list(journal_of(tmp_path).records())
    assert first["loss"] == pytest.approx(sum(record.loss for record in records[:3]) / 3)
    assert second["loss"] == pytest.approx(sum(record.loss for record in records[3:]) / 3)
    assert second["forward_passes"] == 6 * 4
    assert second["loss_diff"] > 0 and second["loss_diff_stderr"] > 0 and second["steps_per_second"] > 0
    assert second["learning_rate"] == 1e-2
    assert not any("grad_norm" in entry for entry in run.state.log_history)
    assert run.state.log_history[-1]["train_loss"] == pytest.approx(sum(record.loss for record in records) / 6)


def test_a_step_uses_the_scheduled_rate_of_that_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, lr_scheduler_type="linear", learning_rate=0.6, max_steps=6, logging_steps=1)
    run.train()
    expected = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert [record.lrs[0] for record in journal_of(tmp_path).records()] == pytest.approx(expected)
    logged = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(expected)


def test_the_default_schedule_falls_in_the_last_third_only(tmp_path: Path) -> None:
    run = trainer(tmp_path, lr_scheduler_type="warmup_stable_decay", learning_rate=0.6, max_steps=10)
    run.train()
    assert [record.lrs[0] for record in journal_of(tmp_path).records()] == pytest.approx([0.6] * 8 + [0.4, 0.2])
    given = {"num_decay_steps": 5, "decay_type": "linear"}
    other = trainer(tmp_path / "b", lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=given, learning_rate=0.6, max_steps=5)
    other.train()
    assert [record.lrs[0] for record in journal_of(tmp_path / "b").records()] == pytest.approx([0.6, 0.48, 0.36, 0.24, 0.12])


@pytest.mark.parametrize("rows", ["choices", "labels"])
def test_accumulating_two_micro_batches_is_the_batch_of_both(rows: str, tmp_path: Path) -> None:
    data: dict[str, Any] = {} if rows == "choices" else {"train_dataset": labelled_rows(), "data_collator": None}
    data["max_steps"] = 3
    whole = trainer(tmp_path / "a", per_device_train_batch_size=16, **data)
    halves = trainer(tmp_path / "b", per_device_train_batch_size=8, gradient_accumulation_steps=2, **data)
    whole.train()
    halves.train()
    steps = [[r for r in journal_of(tmp_path / name).records() if isinstance(r, StepRecord)] for name in ("a", "b")]
    for one, two in zip(*steps, strict=True):
        assert one.coefficients == pytest.approx(two.coefficients, abs=2e-3)
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert losses(whole)[0][1] == pytest.approx(losses(halves)[0][1], rel=1e-5)


class Events(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.optimizer_steps: list[int] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("pre")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("step")
        self.optimizer_steps.append(kwargs["optimizer"].optimizer.steps)

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("substep")


def test_callbacks_see_every_optimizer_step(tmp_path: Path) -> None:
    events = Events()
    trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3, callbacks=[events]).train()
    assert events.seen == ["substep", "pre", "step"] * 3
    assert events.optimizer_steps == [1, 2, 3]


def test_an_epochs_last_step_takes_the_remaining_micro_batches(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=choice_rows(40), per_device_train_batch_size=8, gradient_accumulation_steps=3,
                  num_train_epochs=2, max_steps=-1)  # fmt: skip
    run.train()
    assert len(journal_of(tmp_path)) == run.state.global_step == 4  # 5 micro-batches an epoch: 3, then 2
    assert run.zo_optimizer.sequences_evaluated == 2 * 2 * 40


def test_a_training_step_leaves_generators_and_flags_as_found(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model.train()
    run.model.model.layers[0].eval()
    flags = [module.training for module in run.model.modules()]

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert torch.equal(self.states[0], torch.get_rng_state())
            assert (self.states[1] == np.random.get_state()[1]).all()
            assert self.states[2] == random.getstate()
            assert [module.training for module in run.model.modules()] == flags

    run.add_callback(Watch())
    run.train()
    run.evaluate(choice_rows())
    assert [module.training for module in run.model.modules()] == flags


# --- losses that are not finite ---


def nan_trainer(folder: Path, bad: set[int], **options: Any) -> zotune.ZOTrainer:
    """A trainer whose loss is NaN for every example in the steps with these numbers."""

    def objective(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss = ChoiceLoss(model)(batch)
        return loss * math.nan if run.zo_optimizer.steps in bad else loss

    run = trainer(folder, objective=objective, **options)
    return run


def test_a_loss_that_stays_nan_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    run = nan_trainer(tmp_path, set(range(2, 9)), max_nonfinite_steps=3, max_steps=9)
    with pytest.raises(zotune.NonFiniteLossError, match=r"3 steps in a row, the last being step 4"):
        run.train()
    assert len(journal_of(tmp_path)) == 5


def test_skipped_steps_are_logged_as_skipped_not_as_zero(tmp_path: Path) -> None:
    run = nan_trainer(tmp_path, {1, 4, 5}, max_steps=6, logging_steps=2)
    run.train()
    records = [record.loss for record in journal_of(tmp_path).records()]
    entries = [entry for entry in run.state.log_history if "learning_rate" in entry]
    assert [entry.get("skipped_steps") for entry in entries] == [1, None, 2]
    assert entries[0]["loss"] == pytest.approx(records[0])
    assert entries[1]["loss"] == pytest.approx((records[2] + records[3]) / 2)
    assert "loss" not in entries[2] and "loss_diff" not in entries[2]
    finite = [loss for loss in records if math.isfinite(loss)]
    assert run.state.log_history[-1]["train_loss"] == pytest.approx(sum(finite) / 3)


# --- objectives and evaluation ---


def test_the_objective_follows_the_keys_of_the_batch(tmp_path: Path) -> None:
    chosen = trainer(tmp_path / "a", max_steps=2)
    named = trainer(tmp_path / "b", max_steps=2, objective="choices")
    given = trainer(tmp_path / "c", max_steps=2, objective=lambda model, batch: ChoiceLoss(model)(batch))
    completion = trainer(tmp_path / "d", max_steps=2, data_collator=collate_completions)
    for run in (chosen, named, given, completion):
        run.train()
    assert same_weights(weights(chosen.model), weights(named.model))
    assert same_weights(weights(chosen.model), weights(given.model))
    assert journal_of(tmp_path / "d").records()[0].loss > 3  # of 100 tokens (ln 100 = 4.6), not of 2 options


def test_an_objective_need_not_be_differentiable(tmp_path: Path) -> None:
    def wrong(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (choice_scores(model, batch).argmax(dim=1) != batch["answer"]).float()

    run = trainer(tmp_path, objective=wrong, eps=0.1, learning_rate=0.1, max_steps=60, eval_dataset=choice_rows())
    before = run.evaluate()["eval_loss"]
    run.train()
    assert any(record.coefficients[0] != 0 for record in journal_of(tmp_path).records())
    assert run.evaluate()["eval_loss"] != before


def test_training_on_completions_and_evaluating_on_choices(tmp_path: Path) -> None:
    evaluation = {"eval_dataset": choice_rows(32), "eval_data_collator": collate_choices, "compute_metrics": accuracy}
    run = trainer(tmp_path, data_collator=collate_completions, eval_strategy="steps", eval_steps=3, **evaluation)
    run.train()
    evaluations = [entry for entry in run.state.log_history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    predicted = run.predict(choice_rows(32))
    batch = collate_choices(choice_rows(32))
    with torch.no_grad():
        scores = choice_scores(run.model, batch)
    assert np.allclose(predicted.predictions, scores.log_softmax(dim=1), atol=1e-5)
    assert (predicted.label_ids == batch["answer"].numpy()).all()
    assert predicted.metrics["test_accuracy"] == evaluations[-1]["eval_accuracy"]
    assert predicted.metrics["test_loss"] == pytest.approx(cross_entropy(scores, batch["answer"]).item(), rel=1e-5)


def test_predictions_of_batches_with_fewer_options_never_win(tmp_path: Path) -> None:
    rows = choice_rows(32, options=2)[:16] + choice_rows(32, options=3)[16:]
    predicted = trainer(tmp_path, per_device_eval_batch_size=16).predict(rows)
    assert predicted.predictions.shape == (32, 3)
    assert (np.exp(predicted.predictions[:16, 2]) < 1e-12).all()
    assert np.exp(predicted.predictions).sum(axis=1) == pytest.approx(np.ones(32), abs=1e-5)


def test_options_without_answers_are_scored(tmp_path: Path) -> None:
    rows = choice_rows(8)
    predicted = trainer(
        tmp_path, eval_data_collator=lambda part: {k: v for k, v in collate_choices(part).items() if k != "answer"}
    ).predict(rows)
    assert predicted.predictions.shape == (8, 2) and predicted.label_ids is None


def test_an_unknown_objective_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown objective 'choice'"):
        trainer(tmp_path, objective="choice")


def test_a_model_with_labels_trains_as_under_trainer(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{**row, "text": "a column no model takes"} for row in labelled_rows()])
    run = trainer(tmp_path, train_dataset=rows, eval_dataset=rows, data_collator=None, method="mezo",
                  learning_rate=3e-3, max_steps=150)  # fmt: skip
    before = run.evaluate()
    run.train()
    assert run.evaluate()["eval_loss"] < before["eval_loss"] - 0.05
    assert run.state.log_history[1]["loss_diff_stderr"] > 0  # the model's own loss, as one for each example


def test_a_sequence_classifier_with_a_padding_collator(tmp_path: Path, tiny_lm: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2, **shape))
    texts = ["a fine film", "dreadful", "I loved every minute of it", "a waste of an evening"] * 8
    rows = [{**tokenizer(text), "label": int(number % 4 == 0)} for number, text in enumerate(texts)]
    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": DataCollatorWithPadding(tokenizer)}
    options = {**data, "compute_metrics": accuracy, "method": "mezo", "learning_rate": 1e-3, "max_steps": 60}
    for objective in (None, "classifier"):
        run = trainer(tmp_path / str(objective), model, objective=objective, **options)
        before = run.evaluate()
        run.train()
        after = run.evaluate()
        assert after["eval_loss"] < before["eval_loss"]
        assert 0 <= after["eval_accuracy"] <= 1
    assert run.predict(rows).predictions.shape == (32, 2)


# --- files, reports, the model afterwards ---


def test_tensorboard_gets_its_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, report_to="tensorboard").train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert {"train/loss", "train/loss_diff", "train/forward_passes", "train/learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.parametrize("method", ["mezo", "lozo-m"])
def test_the_best_model_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    every_two = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tmp_path, method=method, learning_rate=0.3, max_steps=12, eval_dataset=choice_rows(),
                  load_best_model_at_end=True, save_total_limit=1, **every_two)  # fmt: skip
    run.train()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(evaluations, key=evaluations.__getitem__)
    assert best < 12, "this seed's best model is its last, which makes for no test"
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert same_weights(weights(saved), weights(run.model))
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluations[best])
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]


def test_checkpoints_beyond_the_limit_are_deleted(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_afterwards_the_model_is_plain_with_the_trained_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, method="lozo", max_steps=5, save_strategy="steps", save_steps=5)
    run.train()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())
    run.save_model()
    batch = collate_choices(choice_rows(4))
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        loaded = LlamaForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(choice_scores(loaded, batch), choice_scores(run.model.eval(), batch))
    # another run may start from it
    trainer(tmp_path / "next", run.model, max_steps=2).train()


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = tiny_llama()
    groups = [
        {"params": [model.lm_head.weight], "lr": 1e-1},
        {"params": [p for name, p in model.named_parameters() if "mlp" in name], "lr": 1e-3},
    ]
    optimizer = zotune.ZerothOrder(model, zotune.methods.mezo(eps=1e-2), params=groups, seed=5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = weights(model)
    run = trainer(tmp_path, model, optimizers=(optimizer, scheduler), max_steps=3)
    run.train()
    assert run.zo_optimizer is optimizer and optimizer.steps == 3
    assert [record.lrs for record in journal_of(tmp_path).records()] == [(0.1, 1e-3), (0.05, 5e-4), (0.025, 2.5e-4)]
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "mlp" in name or name == "lm_head.weight"}


def test_other_optimizers_and_settings_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"steps with zotune.ZerothOrder, not AdamW"):
        trainer(tmp_path, model, optimizers=(torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(ValueError, match="backward-pass optimizer"):
        zotune.ZOTrainer(model, config(tmp_path), optimizer_cls_and_kwargs=(torch.optim.AdamW, {}))
    with pytest.raises(ValueError, match=r"takes args=zotune.ZOConfig\(...\), not TrainingArguments"):
        zotune.ZOTrainer(model, TrainingArguments(output_dir=str(tmp_path)))


def test_a_loss_that_raises_leaves_the_weights_of_the_last_step(tmp_path: Path) -> None:
    def objective(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        losses = ChoiceLoss(model)(batch)
        if run.zo_optimizer.steps == 2:
            raise RuntimeError("a bug in the user's loss")
        return losses

    run = trainer(tmp_path, method="mezo", objective=objective)
    with pytest.raises(RuntimeError, match="a bug in the user's loss"):
        run.train()
    steps = len(journal_of(tmp_path))
    assert steps == 2
    other = trainer(tmp_path / "two", method="mezo", max_steps=6)
    base = tiny_llama()
    zotune.replay(base, tmp_path / "journal.zo").remove_hooks()
    assert same_weights(weights(base), weights(run.model))
    assert not same_weights(weights(base), weights(other.model))
