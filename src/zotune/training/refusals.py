"""What :class:`zotune.ZOConfig` refuses: options without an effect in a run, and values that make no sense, each with the reason.

`tests/unit/training/test_config_fields.py` has a row for every field: it acts, is refused here, or is documented as irrelevant.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType
from transformers.training_args import trainer_log_levels

from zotune import baselines, methods
from zotune.baselines import Baseline, catalog
from zotune.io.suggest import did_you_mean
from zotune.optim.distributed import MODES, Workers
from zotune.optim.evaluator import FORWARD_BATCHING
from zotune.training import reward_options

#: The learning rate is not given: calibrated where the method supports it, else the method's own.
NOT_GIVEN = "auto where known"
SAMPLING = ("stratified", "random", "sequential", "group_by_length")

_RULE = "an update rule is part of the method: choose it with method=..., update_rule=... and update_rule_args=..."
_IN_DTYPE = "forward-only training needs no mixed precision: load the model in that dtype (dtype=torch.{}) instead"
_EVALUATE_IN = "evaluation would cast the weights in place; load the model with dtype=torch.{} instead"
_NO_ACTIVATIONS = "forward passes store no activations, so there is nothing to checkpoint; leave it out"
_COMPILED = "compiled models are not supported yet: zotune attaches to the model's modules; leave it out"
_LIGER = "Liger replaces the layers that zotune attaches to; leave it out"
_FSDP = "sharded models are not supported yet by the trainer; spread it with device_map='auto', or use FSDP2 in your own loop"
_PUSHED = "checkpoints are not pushed while training; use `zotune push RUN REPO`, or trainer.model.push_to_hub(...), afterwards"
_DDP = "processes exchange losses, so there is no DistributedDataParallel; leave it out"

#: Refused with a method of every kind, unless it has its default: field → reason.
REFUSED = {
    "bf16": _IN_DTYPE.format("bfloat16"),
    "fp16": _IN_DTYPE.format("float16"),
    "bf16_full_eval": _EVALUATE_IN.format("bfloat16"),
    "fp16_full_eval": _EVALUATE_IN.format("float16"),
    "neftune_noise_alpha": "its noise acts in training mode and forwards run in evaluation mode; leave it out",
    "deepspeed": "DeepSpeed shards gradients and optimizer states that do not exist here; run without it",
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "parallelism_config": "sharded models are not supported yet; run in one process",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "auto_find_batch_size": "a step of inference memory has one batch size; set per_device_train_batch_size",
    "push_to_hub": _PUSHED,
    "hub_strategy": _PUSHED,
    "hub_always_push": _PUSHED,
    "optim": _RULE,
    "optim_args": _RULE,
    "optim_target_modules": _RULE,
    "ddp_find_unused_parameters": _DDP,
    "ddp_bucket_cap_mb": _DDP,
    "ddp_broadcast_buffers": _DDP,
    "ddp_static_graph": _DDP,
    "logging_nan_inf_filter": "it would hide diverged steps; leave it False, they are logged as skipped",
    "dataloader_in_order": "the order of the examples would depend on the workers' speed, and no run could be repeated; leave it True",
    "ignore_data_skip": "a resumed run takes the examples that the unbroken run would have taken; leave it out",
    "enable_jit_checkpoint": "it would write into a checkpoint before it is whole; `zotune train` saves on SIGTERM by itself; leave it out",
    "save_on_each_node": "the first process writes the run; share output_dir, or copy it afterwards",
    "debug": "its hooks replace what zotune attaches to the layers, and a loss that is not finite is named anyway; leave it out",
}
_CHECKPOINTING = (
    "activation_checkpointing", "gradient_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
)  # fmt: skip
# Refused without a backward pass.
_OF_BACKWARD = dict.fromkeys(_CHECKPOINTING, _NO_ACTIVATIONS) | {
    "max_grad_norm": "no gradient is computed, so none can be clipped; leave it at 0"
}
# Options of some first-order methods.
_ADAM = {
    "adam_beta1": "pass method='mezo-adam' with update_rule_args={'betas': [..., ...]}",
    "adam_beta2": "pass method='mezo-adam' with update_rule_args={'betas': [..., ...]}",
    "adam_epsilon": "pass method='mezo-adam' with update_rule_args={'eps': ...}",
}
ADAM_FIELDS = tuple(_ADAM)
# Refused without evaluations during training.
_OF_EVALUATIONS = ("load_best_model_at_end", "metric_for_best_model", "eval_delay")
# Refused without workers that load the data.
_OF_WORKERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
# Fields of accelerator_config that act; the others are about batches that accelerate would divide or gradients that it would sum.
_ACCELERATOR = ("non_blocking", "use_configured_state")
_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_NO_SCHEDULE_OPTIONS = ("constant", "constant_with_warmup")

_LOWEST = {
    "rank": 1, "interval": 1, "max_nonfinite_steps": 1, "check_workers_steps": 0, "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0,
    "anchor_decay": 0,
    "max_completion_length": 1, "num_generations": 1, "temperature": 0, "top_k": 0, "max_failed_rewards": 0, "num_completions_to_print": 1,
}  # fmt: skip
_NOTHING: tuple[Any, ...] = (None, False, "", 0, 0.0, {}, [])


def check(config: Any) -> None:
    """ValueError where a config asks for what a run would not do; the message names the reason and the fix.

    Args:
        config: a :class:`zotune.ZOConfig`, before `TrainingArguments` has derived its own values.
    """
    usual = baselines.recipe(config.method)() if catalog.is_baseline(config.method) else None
    _check_backward(config, usual)
    for name, reason in REFUSED.items():
        if _given(config, name):
            raise _unusable(config, name, reason)
    _check_values(config)
    _check_choices(config, usual)
    _check_evaluations(config)
    _check_loading(config)
    _check_schedule(config)
    reward_options.check(config)


def untouched(name: str) -> Any:
    """The value of a field of `TrainingArguments` that nobody has set."""
    default = next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == name)
    return TrainingArguments.default_optim if name == "optim" else default


def _given(config: Any, name: str) -> bool:
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    value, default = getattr(config, name), TrainingArguments.default_optim if name == "optim" else field.default
    return value != default and not (value in _NOTHING and default in (*_NOTHING, dataclasses.MISSING))


def _unusable(config: Any, name: str, reason: str) -> ValueError:
    return ValueError(f"{name}={getattr(config, name)!r} cannot be used: {reason}.")


def _check_backward(config: Any, usual: Baseline | None) -> None:
    trains = usual is not None and usual.kind == "backward"
    for name, reason in _OF_BACKWARD.items():
        if usual is not None and trains and not (usual.blocks and name in _CHECKPOINTING):
            continue
        if trains:
            reason = f"{config.method} stores the activations of its last blocks only, in evaluation mode; leave it out"
        if _given(config, name):
            raise _unusable(config, name, reason)
    if not (config.activation_checkpointing or config.gradient_checkpointing):
        for name in _CHECKPOINTING[2:]:
            if _given(config, name):
                raise _unusable(config, name, f"it is an option of {name.removesuffix('_kwargs')}; set that too, or leave it out")
    for name in _CHECKPOINTING[2:]:
        if (getattr(config, name) or {}).get("use_reentrant"):
            raise _unusable(config, name, "reentrant checkpoints need backward(), and gradients come from grad(); leave use_reentrant out")
    own = baselines.options_of(config.method) if usual is not None else {}
    for name, reason in _ADAM.items():
        if name not in own and _given(config, name):
            raise _unusable(config, name, reason if usual is None else f"{config.method} has no such option")


def _check_values(config: Any) -> None:
    for name, lowest in _LOWEST.items():
        value = getattr(config, name)
        if value not in (None, methods.AUTO, NOT_GIVEN) and not value >= lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}.")
    for name in ("eps", "num_train_epochs"):
        value = getattr(config, name)
        if value not in (None, methods.AUTO) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    if config.momentum is not None and not 0 <= config.momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {config.momentum}.")
    if not 0 <= config.label_smoothing_factor < 1:
        raise ValueError(f"label_smoothing_factor must be in [0, 1), got {config.label_smoothing_factor}.")
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(f"max_steps must be at least 1 (or -1 to count epochs instead), got {config.max_steps}.")


def _check_choices(config: Any, usual: Baseline | None) -> None:
    known = {
        "forward_batching": FORWARD_BATCHING,
        "parallelism": MODES,
        "train_sampling_strategy": SAMPLING,
        "log_level": tuple(trainer_log_levels),
        "log_level_replica": tuple(trainer_log_levels),
    }
    for name, choices in known.items():
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}{did_you_mean(str(value), choices)}: choose one of {', '.join(choices)}.")
    if config.anchor_decay and usual is not None:
        raise _unusable(config, "anchor_decay", f"it is an option of zeroth-order methods, and {config.method} is none; leave it out")
    if config.anchor_decay and config.weight_decay:
        raise _unusable(config, "anchor_decay", "weight_decay shrinks the same weights toward 0; set one of them to 0")
    if usual is not None and config.forward_batching != "auto":
        why = "evaluates one point after the other" if usual.blocks else "evaluates no perturbed weights"
        raise _unusable(config, "forward_batching", f"{config.method} {why}; leave it out")


def _check_evaluations(config: Any) -> None:
    if config.eval_strategy == "no":
        if config.save_strategy == "best":
            raise _unusable(config, "save_strategy", "no checkpoint is the best one without evaluations; set eval_strategy='steps'")
        for name in _OF_EVALUATIONS:
            if _given(config, name):
                raise _unusable(config, name, "there are no evaluations during training; set eval_strategy='steps', or leave it out")
    if config.greater_is_better is not None and config.metric_for_best_model is None and not config.load_best_model_at_end:
        raise _unusable(config, "greater_is_better", "it says how to compare metric_for_best_model; set that too, or leave it out")


def _check_loading(config: Any) -> None:
    if config.dataloader_num_workers == 0:
        for name in _OF_WORKERS:
            if _given(config, name):
                raise _unusable(config, name, "it is an option of dataloader_num_workers, which is 0; set that too, or leave it out")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise ValueError(f"accelerate launch asks for {name}, which cannot be used: configure it for processes alone.")
    if config.ddp_backend is not None and max(Workers().size, int(os.environ.get("WORLD_SIZE") or 1)) == 1:
        raise _unusable(config, "ddp_backend", "it is an option of several processes (torchrun, accelerate launch); leave it out")
    given = config.accelerator_config
    if given is None:
        return
    usual = AcceleratorConfig().to_dict()
    if isinstance(given, str):
        given = AcceleratorConfig.from_json_file(given).to_dict()
    elif isinstance(given, AcceleratorConfig):
        given = given.to_dict()
    for name, value in given.items():
        if name not in usual:
            raise ValueError(f"accelerator_config has no option {name!r}{did_you_mean(name, usual)}.")
        if name not in _ACCELERATOR and value not in (usual[name], {"num_steps": 1}):
            raise ValueError(
                f"accelerator_config={{{name!r}: {value!r}}} cannot be used: zotune divides the batches of a step itself, in an order "
                "that seed and epoch alone decide; leave it out."
            )


def _check_schedule(config: Any) -> None:
    kind, options = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)), config.lr_scheduler_kwargs or {}
    kinds = [each.value for each in SchedulerType]
    if kind not in kinds:
        raise ValueError(f"unknown lr_scheduler_type {kind!r}{did_you_mean(kind, kinds)}: choose one of {', '.join(kinds)}.")
    if config.warmup_steps and kind in _NO_WARMUP:
        instead = "; choose constant_with_warmup" if kind == "constant" else "; leave it out"
        raise _unusable(config, "warmup_steps", f"the schedule {kind!r} has no warmup{instead}")
    if options and kind in _NO_SCHEDULE_OPTIONS:
        raise _unusable(config, "lr_scheduler_kwargs", f"the schedule {kind!r} has no options; leave it out")
    if kind == "warmup_stable_decay":
        options = {"num_decay_steps": 1, **options}
    try:
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1, 10, options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"lr_scheduler_kwargs={config.lr_scheduler_kwargs!r} do not fit the schedule {kind!r}: {reason}.") from None
