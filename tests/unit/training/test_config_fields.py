"""Every field of ZOConfig acts, is refused with the reason, or is documented as irrelevant: a new field needs a row here."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_pt_utils import EvalLoopContainer

import zotune
from command_cases import word_tokenizer
from paths import ROOT
from trainer_cases import accuracy, choice_rows, config, labelled_rows, trainer, weights

# --- refused: field -> (value, part of the reason) ---

REFUSED: dict[str, tuple[Any, str]] = {
    "optim": ("adamw_torch", "choose it with method=..., update_rule=..."),
    "optim_args": ("a=1", "choose it with method=..., update_rule=..."),
    "optim_target_modules": ("all-linear", "choose it with method=..., update_rule=..."),
    "bf16": (True, "load the model in that dtype"),
    "fp16": (True, "load the model in that dtype"),
    "bf16_full_eval": (True, "load the model with dtype=torch.bfloat16"),
    "fp16_full_eval": (True, "load the model with dtype=torch.float16"),
    "torch_compile": (True, "compiled models are not supported yet"),
    "torch_compile_backend": ("eager", "compiled models are not supported yet"),
    "torch_compile_mode": ("default", "compiled models are not supported yet"),
    "use_liger_kernel": (True, "Liger replaces the layers"),
    "liger_kernel_config": ({"rope": True}, "Liger replaces the layers"),
    "neftune_noise_alpha": (5.0, "its noise acts in training mode"),
    "auto_find_batch_size": (True, "set per_device_train_batch_size"),
    "logging_nan_inf_filter": (True, "logged as skipped"),
    "save_on_each_node": (True, "the first process writes the run"),
    "enable_jit_checkpoint": (True, "saves on SIGTERM by itself"),
    "push_to_hub": (True, "use `zotune push RUN REPO`"),
    "hub_strategy": ("end", "checkpoints are not pushed while training"),
    "hub_always_push": (True, "checkpoints are not pushed while training"),
    "ignore_data_skip": (True, "takes the examples that the unbroken run would have taken"),
    "parallelism_config": ({"tp_size": 2}, "sharded models are not supported yet"),
    "dataloader_in_order": (False, "no run could be repeated"),
    "ddp_find_unused_parameters": (True, "there is no DistributedDataParallel"),
    "ddp_bucket_cap_mb": (25, "there is no DistributedDataParallel"),
    "ddp_broadcast_buffers": (True, "there is no DistributedDataParallel"),
    "ddp_static_graph": (True, "there is no DistributedDataParallel"),
    "fsdp": ("full_shard", "sharded models are not supported yet"),
    "fsdp_config": ({"min_num_params": 1}, "sharded models are not supported yet"),
    "deepspeed": ("ds.json", "run without it"),
    "debug": ("underflow_overflow", "its hooks replace what zotune attaches"),
}

# --- irrelevant: to a run in one process on a CPU, to everything but a script of one's own, or to a service that is not asked for ---

IRRELEVANT = {
    "average_tokens_across_devices", "log_on_each_node", "log_level_replica", "eval_use_gather_object", "ddp_backend", "ddp_timeout",
    "local_rank", "use_cpu", "tf32", "dataloader_pin_memory", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "hub_token", "hub_model_id", "hub_private_repo", "hub_revision", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id",
}  # fmt: skip

# --- it acts: the test that shows it ---

_HERE = "tests/unit/training/test_config_effects.py::"
_PRIVATE = "tests/unit/training/test_private_runs.py::"
_TRAINER = "tests/unit/training/test_trainer.py::"
SHOWN_BY = {
    "attribute_every": "tests/unit/attribution/test_shares.py::test_steps_between_the_measured_ones_are_scaled",
    "attribute_examples": "tests/unit/attribution/test_shares.py::test_fewer_validation_examples_are_evaluated",
    "dp_epsilon": _PRIVATE + "test_a_run_spends_no_more_than_its_epsilon",
    "dp_noise_multiplier": _PRIVATE + "test_a_run_writes_no_loss_and_its_key_for_the_owner_alone",
    "dp_clip": "tests/unit/optim/test_privacy.py::test_the_noise_has_the_stated_deviation",
    "dp_delta": "tests/unit/optim/test_privacy.py::test_epsilon_is_that_of_published_settings",
    "dp_neighbors": "tests/unit/optim/test_privacy.py::test_epsilon_is_that_of_published_settings",
    "report_to": _TRAINER + "test_tensorboard_gets_its_event_file",
    "load_best_model_at_end": _TRAINER + "test_the_best_model_is_loaded_at_the_end",
    "max_nonfinite_steps": _TRAINER + "test_a_loss_that_stays_nan_stops_the_run_and_names_the_step",
    "train_sampling_strategy": "tests/unit/training/test_trainer_order.py::test_grouping_pads_less_and_takes_each_example_once_an_epoch",
    "dataloader_drop_last": "tests/unit/training/test_samplers.py::test_drop_last_says_how_many_rows_are_left_out",
    "label_smoothing_factor": _HERE + "test_smoothing_and_a_loss_function_act_on_a_models_own_loss",
    "torch_empty_cache_steps": _HERE + "test_the_device_cache_is_emptied_every_few_steps",
    "restore_callback_states_from_checkpoint": _HERE + "test_callbacks_go_on_from_a_checkpoint",
    "full_determinism": _HERE + "test_full_determinism_is_torchs",
    "dataloader_persistent_workers": _HERE + "test_persistent_workers_are_of_their_own_data",
}


class Seen(NamedTuple):
    """What a run did: its trainer, its folder, what callbacks and metrics were given."""

    run: zotune.ZOTrainer
    folder: Path
    evaluated: list[Any]
    batches: list[int]

    def digest(self) -> str:
        return str([tensor.double().sum().item() for tensor in weights(self.run.model).values()])

    def history(self) -> list[tuple[int, tuple[str, ...]]]:
        return [(entry["step"], tuple(sorted(entry))) for entry in self.run.state.log_history]

    def evaluations(self) -> list[int]:
        return [entry["step"] for entry in self.run.state.log_history if "eval_loss" in entry]

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def loader(self) -> Any:
        return self.run.get_train_dataloader()


class Counts(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


EVAL = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
SAVE = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
OWN = {"train_dataset": labelled_rows(), "data_collator": None}
FIRST = {"method": "fo-adamw", "learning_rate": 1e-3}
CHECKPOINTED = {**FIRST, "activation_checkpointing": True}
WITH_LENGTHS = {
    "train_dataset": [{**row, "length": n % 5 + 1, "size": n % 7 + 1} for n, row in enumerate(choice_rows())],
    "train_sampling_strategy": "group_by_length",
    "per_device_train_batch_size": 4,
}
TEXT = {"train_dataset": datasets.Dataset.from_list([{**row, "text": "a film"} for row in labelled_rows()]), "data_collator": None}
PROMPTS = [{"prompt": f"the {noun} is"} for noun in ("film", "plot", "cast", "movie")]
REWARDED = {
    "reward_funcs": [lambda completion_ids, **columns: [sum(token < 50 for token in ids) / len(ids) for ids in completion_ids]],
    "train_dataset": PROMPTS, "data_collator": None, "processing_class": word_tokenizer(["<s>"]), "per_device_train_batch_size": 4,
    "max_completion_length": 4, "method": "lozo", "eps": 0.3,
}  # fmt: skip
SAMPLED = {**REWARDED, "temperature": 1.0}
SHOWN = {**REWARDED, **EVAL, "eval_dataset": PROMPTS, "compute_metrics": None}
Look = Callable[[Seen], Any]
shown: Look = lambda seen: [path.read_text().count("\n") for path in seen.folder.rglob("completions.jsonl")]  # noqa: E731
forwards: Look = lambda seen: seen.run.calls  # noqa: E731
recomputed: Look = lambda seen: getattr(seen.run.model.model.layers[0]._gradient_checkpointing_func, "keywords", None)  # noqa: E731

# field -> (options beside it, a value, another value, what differs)
ACTS: dict[str, tuple[dict[str, Any], Any, Any, Look]] = {
    "per_device_train_batch_size": ({}, None, 8, lambda seen: seen.run.zo_optimizer.sequences_evaluated),
    "num_train_epochs": ({"max_steps": -1, "per_device_train_batch_size": 32}, 1, 2, lambda seen: seen.run.state.global_step),
    "max_steps": ({}, 1, 3, lambda seen: seen.run.state.global_step),
    "learning_rate": ({}, None, 1e-3, Seen.digest),
    "lr_scheduler_type": ({}, None, "linear", Seen.digest),
    "lr_scheduler_kwargs": ({"lr_scheduler_type": "cosine_with_min_lr"}, {"min_lr_rate": 0.1}, '{"min_lr_rate": 0.9}', Seen.digest),
    "warmup_steps": ({"lr_scheduler_type": "linear"}, 0, 2, Seen.digest),
    "weight_decay": ({}, None, 0.5, Seen.digest),
    "anchor_decay": ({"interval": 1}, None, 5.0, Seen.digest),
    "gradient_accumulation_steps": ({}, None, 2, lambda seen: seen.run.zo_optimizer.sequences_evaluated),
    "max_grad_norm": ({"method": "fo-sgd"}, 0.0, 1e-3, Seen.digest),
    "adam_beta1": (FIRST, 0.9, 0.5, Seen.digest),
    "adam_beta2": (FIRST, 0.999, 0.5, Seen.digest),
    "adam_epsilon": (FIRST, 1e-8, 1.0, Seen.digest),
    "activation_checkpointing": (FIRST, False, True, lambda seen: seen.run.model.is_activation_checkpointing),
    "gradient_checkpointing": (FIRST, False, True, lambda seen: seen.run.model.is_activation_checkpointing),
    "activation_checkpointing_kwargs": (CHECKPOINTED, {"preserve_rng_state": False}, '{"preserve_rng_state": true}', recomputed),
    "gradient_checkpointing_kwargs": (CHECKPOINTED, {"preserve_rng_state": False}, {"preserve_rng_state": True}, recomputed),
    "use_cache": ({}, None, True, lambda seen: seen.run.model.config.use_cache),
    "logging_strategy": ({}, None, "no", Seen.history),
    "logging_steps": ({}, None, 1, Seen.history),
    "logging_first_step": ({}, None, True, Seen.history),
    "include_num_input_tokens_seen": ({}, None, "all", lambda seen: seen.run.state.num_input_tokens_seen),
    "log_level": ({}, "error", "debug", lambda seen: transformers.logging.get_verbosity()),
    "disable_tqdm": ({}, None, False, lambda seen: sorted(type(each).__name__ for each in seen.run.callback_handler.callbacks)),
    "eval_strategy": ({**EVAL}, "no", "steps", Seen.evaluations),
    "eval_steps": ({**EVAL}, 2, 1, Seen.evaluations),
    "eval_delay": ({**EVAL}, None, 3, Seen.evaluations),
    "eval_on_start": ({**EVAL}, None, True, Seen.evaluations),
    "per_device_eval_batch_size": ({**EVAL}, None, 8, lambda seen: len(seen.batches)),
    "prediction_loss_only": ({**EVAL}, None, True, Seen.history),
    "eval_do_concat_batches": ({**EVAL}, None, False, lambda seen: type(seen.evaluated[0].predictions)),
    "eval_accumulation_steps": ({**EVAL}, None, 1, lambda seen: seen.run.moved),
    "include_for_metrics": ({**EVAL}, None, ["loss"], lambda seen: seen.evaluated[0].losses is None),
    "batch_eval_metrics": ({**EVAL, "per_device_eval_batch_size": 8}, False, True, lambda seen: len(seen.evaluated)),
    "save_only_model": ({**SAVE}, None, True, Seen.files),
    "save_strategy": ({**SAVE}, "no", "steps", Seen.files),
    "save_steps": ({**SAVE}, 2, 1, Seen.files),
    "save_total_limit": ({**SAVE}, None, 1, Seen.files),
    "metric_for_best_model": ({**EVAL}, "loss", "accuracy", lambda seen: seen.run.state.best_metric),
    "greater_is_better": ({**EVAL, "metric_for_best_model": "loss"}, False, True, lambda seen: seen.run.state.best_metric),
    "seed": ({}, None, 2, Seen.digest),
    "data_seed": ({}, None, 2, Seen.digest),
    "accelerator_config": ({}, None, {"non_blocking": True}, lambda seen: seen.run.accelerator.dataloader_config.non_blocking),
    "dataloader_num_workers": ({}, None, 2, lambda seen: seen.loader().num_workers),
    "dataloader_prefetch_factor": ({"dataloader_num_workers": 1}, 2, 3, lambda seen: seen.loader().prefetch_factor),
    "dataloader_multiprocessing_context": (
        {"dataloader_num_workers": 1}, "fork", "spawn", lambda seen: seen.loader().multiprocessing_context.get_start_method()),
    "remove_unused_columns": (TEXT, False, True, lambda seen: seen.loader().dataset.column_names),
    "label_names": ({**OWN}, None, ["other"], lambda seen: seen.run.predict(labelled_rows(4)).label_ids is None),
    "length_column_name": (WITH_LENGTHS, "length", "size", Seen.digest),
    "skip_memory_metrics": ({}, None, False, lambda seen: sorted(seen.run.state.log_history[-1])),
    "output_dir": ({}, None, "other", lambda seen: seen.run.args.output_dir and (Path(seen.run.args.output_dir) / "journal.zo").is_file()),
    # the fields of zotune's own
    "method": ({}, None, "mezo", Seen.digest),
    "eps": ({}, None, 1e-1, Seen.digest),
    "num_directions": ({}, None, 2, Seen.digest),
    "directions_per": ({}, None, "example", Seen.digest),
    "group_size": ({"directions_per": "group"}, 2, 4, Seen.digest),
    "forward_batching": ({}, "batched", "sequential", forwards),
    "direction": ({"method": "mezo"}, "gaussian", "rademacher", Seen.digest),
    "estimator": ({}, None, "forward", Seen.digest),
    "fitness": ({}, None, "ranks", Seen.digest),
    "rank": ({}, None, 1, Seen.digest),
    "interval": ({}, None, 1, Seen.digest),
    "momentum": ({"method": "lozo-m"}, 0.1, 0.9, Seen.digest),
    "update_rule": ({}, None, "RMSprop", Seen.digest),
    "update_rule_args": ({}, None, '{"momentum": 0.9}', Seen.digest),
    "method_args": ({}, None, {"rank": 1}, Seen.digest),
    "max_completion_length": (REWARDED, 2, 4, Seen.digest),
    "num_generations": (SAMPLED, 1, 2, Seen.digest),
    "temperature": (REWARDED, 0.5, 1.0, Seen.digest),
    "top_p": (SAMPLED, 1.0, 0.2, Seen.digest),
    "top_k": (SAMPLED, 0, 2, Seen.digest),
    "reward_weights": (REWARDED, [1.0], [-1.0], Seen.digest),
    "max_failed_rewards": (REWARDED, None, 3, lambda seen: seen.run.rewards.loss.rewards.limit.most),
    "kv_cache_memory": (REWARDED, None, "1MiB", lambda seen: seen.run.rewards.loss.kv_cache),
    "log_completions": (SHOWN, None, False, shown),
    "num_completions_to_print": (SHOWN, 1, 2, shown),
    "parallelism": ({}, None, "directions", lambda seen: seen.run.workers.parallelism),
    "check_workers_steps": ({}, None, 5, lambda seen: seen.run.workers.check_every),
}  # fmt: skip


def test_every_field_has_a_row() -> None:
    tables = (REFUSED, IRRELEVANT, SHOWN_BY, ACTS)
    rows = [name for table in tables for name in table]
    assert len(rows) == len(set(rows)), "a field has two rows"
    assert set(rows) == {field.name for field in dataclasses.fields(zotune.ZOConfig)}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", ["lozo", "fo-adamw"])
def test_what_is_refused_says_why(name: str, method: str, tmp_path: Path) -> None:
    value, reason = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        config(tmp_path, method=method, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}=") and reason in message and "\n" not in message


def test_what_is_irrelevant_is_documented() -> None:
    page = (
        (ROOT / "docs/reference/config.md").read_text(encoding="utf-8").partition("## Options without an effect")[2].partition("\n## ")[0]
    )
    assert {name for name in IRRELEVANT if f"`{name}`" not in page} == set()


def test_the_tests_that_show_an_effect_exist() -> None:
    for place in SHOWN_BY.values():
        path, _, name = place.partition("::")
        functions = {node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, place


@pytest.fixture(autouse=True)
def usual_verbosity() -> Any:
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)


def seen(folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Seen:
    options = {"method": "lozo", "max_steps": 3, "logging_steps": 2, **options}
    evaluated: list[Any] = []
    moved: list[int] = []
    usual = EvalLoopContainer.to_cpu_and_numpy
    monkeypatch.setattr(EvalLoopContainer, "to_cpu_and_numpy", lambda self: (moved.append(1), usual(self))[1])

    def metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        evaluated.append(prediction)
        lists = isinstance(prediction.predictions, list)
        return {"accuracy": 0.5} if lists or torch.is_tensor(prediction.predictions) else accuracy(prediction)

    counts = Counts()
    if options.get("eval_strategy") is not None:
        options = {"eval_dataset": choice_rows(24), "compute_metrics": metrics, **options}
    place = options.pop("output_dir", None)
    run = trainer(folder / (place or "run"), callbacks=[counts], **options)
    run.calls = run.moved = 0
    run.model.register_forward_hook(lambda *_: setattr(run, "calls", run.calls + 1))
    if options.get("dataloader_num_workers", 0) == 0:  # processes would take longer than the run
        run.train()
    run.moved = len(moved)
    return Seen(run, folder / (place or "run"), evaluated, counts.seen)


SEEN: dict[str, Seen] = {}


@pytest.mark.parametrize("name", ACTS)
def test_what_acts_changes_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, one, other, look = ACTS[name]
    found = []
    for number, value in enumerate((one, other)):
        options = {key: content for key, content in beside.items() if key != name} | ({} if value is None else {name: value})
        key = repr(sorted(options.items()))
        if key not in SEEN or name == "log_level":  # one run for the many rows that compare with it
            SEEN[key] = seen(tmp_path / str(number), options, monkeypatch)
        found.append(look(SEEN[key]))
    if name == "output_dir":
        assert all(found)
    else:
        assert found[0] != found[1]
