"""Options that act together: what a run does with them, and the combinations that would do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, EarlyStoppingCallback

from trainer_cases import accuracy, choice_rows, collate_completions, config, labelled_rows, losses, same_weights, trainer, weights
from zotune.objectives import ClassifierLoss
from zotune.training import trainer as trainer_module

OWN = {"train_dataset": labelled_rows(), "data_collator": None}


# --- the model's own loss: label_smoothing_factor, compute_loss_func ---


def logit_sum(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs["logits"].square().mean()


def test_smoothing_and_a_loss_function_act_on_a_models_own_loss(tmp_path: Path) -> None:
    found = []
    for number, options in enumerate(({}, {"label_smoothing_factor": 0.5}, {"compute_loss_func": logit_sum})):
        run = trainer(tmp_path / str(number), method="mezo", max_steps=2, **OWN, **options)
        run.train()
        found.append((losses(run)[0][1], weights(run.model)))
    for one in (1, 2):
        assert found[0][0] != found[one][0] and not same_weights(found[0][1], found[one][1])
    assert found[2][0] < 1  # the squares of a new model's logits are small


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.5}, {"compute_loss_func": logit_sum}])
@pytest.mark.parametrize("kind", ["choices", "lm", "classifier", "function", "keys"])
def test_smoothing_and_a_foreign_loss_function_are_refused(option: dict[str, Any], kind: str, tmp_path: Path) -> None:
    objective = {"function": lambda model, batch: model(**batch).logits.sum(), "keys": None}.get(kind, kind)
    with pytest.raises(ValueError, match=rf"{next(iter(option))} acts on the loss that a model computes from its labels"):
        trainer(tmp_path, objective=objective, data_collator=collate_completions, **option).train()
    assert not (tmp_path / "journal.zo").exists()


# --- evaluations ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_best_model_at_end": True}, "there are no evaluations during training"),
        ({"load_best_model_at_end": True, "save_strategy": "best"}, "no checkpoint is the best one without evaluations"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "no checkpoint is the best one without evaluations"),
        ({"metric_for_best_model": "loss"}, "there are no evaluations during training"),
        ({"eval_delay": 3}, "there are no evaluations during training"),
        ({"greater_is_better": True, "eval_strategy": "steps"}, "it says how to compare metric_for_best_model"),
        ({"warmup_steps": 2, "lr_scheduler_type": "constant"}, "choose constant_with_warmup"),
        ({"lr_scheduler_kwargs": {"foo": 1}, "lr_scheduler_type": "linear"}, "do not fit the schedule 'linear'"),
        ({"lr_scheduler_kwargs": {"foo": 1}, "lr_scheduler_type": "constant"}, "has no options"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": "{foo"}, "lr_scheduler_kwargs must be JSON"),
        ({"lr_scheduler_type": "liner"}, "did you mean 'linear'"),
        ({"train_sampling_strategy": "stratifed"}, "did you mean 'stratified'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "unknown train_sampling_strategy"),
        ({"log_level": "loud"}, "unknown log_level 'loud'"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be in [0, 1), got 1.0"),
        ({"dataloader_persistent_workers": True}, "it is an option of dataloader_num_workers"),
        ({"dataloader_prefetch_factor": 2}, "it is an option of dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "fork"}, "it is an option of dataloader_num_workers"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": False}, "method": "fo-sgd"}, "set that too"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}, "method": "fo-sgd"},
            "leave use_reentrant out",
        ),
        ({"accelerator_config": {"split_batches": True}}, "zotune divides the batches of a step itself"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "seed and epoch alone decide"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "zotune divides the batches"),
        ({"accelerator_config": {"split_batch": True}}, "did you mean 'split_batches'"),
        ({"ddp_backend": "gloo"}, "it is an option of several processes"),
    ],
)
def test_what_would_do_nothing_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        config(tmp_path, **{"save_strategy": "steps", **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_can_be_copied(tmp_path: Path) -> None:
    import dataclasses

    made = config(tmp_path, accelerator_config={"non_blocking": True}, lr_scheduler_type="linear", warmup_steps=2)
    assert dataclasses.replace(made, seed=7).warmup_steps == 2


def test_a_launcher_that_asks_for_sharding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate launch asks for FSDP"):
        config(tmp_path)


def test_an_evaluation_at_the_start_needs_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_on_start=True needs an eval_dataset"):
        trainer(tmp_path, eval_on_start=True)


def test_a_metric_that_there_is_not_is_refused_before_training(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "acuracy"}
    with pytest.raises(ValueError, match=r"'acuracy' is none of the metrics .* others need compute_metrics"):
        trainer(tmp_path, eval_dataset=choice_rows(8), **options)
    with pytest.raises(ValueError, match=r"there are good_loss"):
        trainer(tmp_path, eval_dataset={"good": choice_rows(8)}, **options)
    run = trainer(tmp_path, eval_dataset=choice_rows(8), compute_metrics=accuracy, **options)  # only its result has the names
    with pytest.raises(ValueError, match=r"which is not found .*eval_accuracy"):
        run.train()


def test_persistent_workers_are_of_their_own_data(tmp_path: Path) -> None:
    few, many = choice_rows(8), choice_rows(24)
    run = trainer(tmp_path, eval_dataset=few, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert len(run.get_eval_dataloader().dataset) == 8
    assert len(run.get_eval_dataloader(many).dataset) == 24
    assert run.get_eval_dataloader() is run.get_eval_dataloader()


# --- the rest ---


def test_the_device_cache_is_emptied_every_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    run = trainer(tmp_path, torch_empty_cache_steps=2, max_steps=5)
    monkeypatch.setattr(trainer_module, "clear_device_cache", lambda: emptied.append(run.state.global_step))
    run.train()
    assert emptied == [0, 2, 4]


def test_callbacks_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
               "load_best_model_at_end": True, "eval_dataset": choice_rows(8)}  # fmt: skip
    patience = []
    for restore in (False, True):
        folder = tmp_path / str(restore)
        trainer(folder, callbacks=[EarlyStoppingCallback(early_stopping_patience=9)], **options).train()
        second = EarlyStoppingCallback(early_stopping_patience=3)
        more = {**options, "max_steps": 6, "restore_callback_states_from_checkpoint": restore}
        resumed = trainer(folder, callbacks=[second], **more)
        resumed.train(resume_from_checkpoint=True)
        (found,) = [each for each in resumed.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        patience.append(found.early_stopping_patience)
    assert patience == [3, 9]


def test_full_determinism_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "CUDA_LAUNCH_BLOCKING",
        "CUBLAS_WORKSPACE_CONFIG",
        "ASCEND_LAUNCH_BLOCKING",
        "HCCL_DETERMINISTIC",
        "FLASH_ATTENTION_DETERMINISTIC",
    ):
        monkeypatch.setenv(name, "")  # put back afterwards
    before = torch.are_deterministic_algorithms_enabled()
    try:
        trainer(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_columns_that_no_model_takes_reach_no_collator(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{**row, "text": "a film"} for row in labelled_rows()])

    def collate(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(row.keys() == {"input_ids", "labels"} for row in part)
        return {name: torch.tensor([row[name] for row in part]) for name in ("input_ids", "labels")}

    run = trainer(tmp_path, train_dataset=rows, data_collator=collate, method="mezo", learning_rate="auto", eps="auto", max_steps=2)
    run.train()


# --- classifiers ---


def classifier(labels: Any, **shape: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(**sizes, **shape)).eval()
    ids = torch.randint(0, 50, (4, 5))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels)}


@pytest.mark.parametrize(
    ("labels", "shape"),
    [
        ([0.5, -1.0, 2.0, 0.0], {"num_labels": 1}),
        ([0, 3, 2, 1], {"num_labels": 1}),
        ([[0.5, 1.0], [0.0, 0.1], [1.0, 2.0], [0.0, 0.0]], {"num_labels": 2, "problem_type": "regression"}),
        ([[0.0, 1.0, 1.0]] * 4, {"num_labels": 3}),
        ([0, 2, 1, 1], {"num_labels": 3}),
    ],
)
def test_a_classifiers_loss_is_that_of_transformers(labels: Any, shape: dict[str, Any]) -> None:
    model, batch = classifier(labels, **shape)
    ours = ClassifierLoss(model)(batch)
    assert ours.shape == (4,)
    assert ours.mean().item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "shape", "message"),
    [
        ([[0.5, 1.0]] * 4, {"num_labels": 1}, "give each example one number"),
        ([0.5, 1.0, 0.0, 1.0], {"num_labels": 3}, "one 0.0 or 1.0 for every output"),
        ([0.5, 1.0, 0.0, 1.0], {"num_labels": 3, "problem_type": "single_label_classification"}, "num_labels=1 for a regression"),
        ([[0, 1]] * 4, {"num_labels": 3}, "give each example one whole number"),
        ([0, 1, 3, 2], {"num_labels": 3}, "num_labels=4"),
    ],
)
def test_labels_that_do_not_fit_a_classifier_are_named(labels: Any, shape: dict[str, Any], message: str) -> None:
    model, batch = classifier(labels, **shape)
    with pytest.raises(ValueError) as caught:
        ClassifierLoss(model)(batch)
    assert message in str(caught.value)


def test_one_output_is_trained_as_a_regression(tmp_path: Path) -> None:
    model, _ = classifier([0.0] * 4, num_labels=1)
    rows = [{"input_ids": [n % 50] * 5, "attention_mask": [1] * 5, "label": float(n % 3)} for n in range(32)]
    run = trainer(tmp_path, model, objective="classifier", train_dataset=rows, eval_dataset=rows, data_collator=None, method="mezo",
                  learning_rate=1e-3, max_steps=40)  # fmt: skip
    before = run.evaluate()["eval_loss"]
    assert before == pytest.approx(np.mean([n % 3 for n in range(32)]) ** 2 + 0.66, abs=0.5)
    run.train()
    assert run.evaluate()["eval_loss"] < before
