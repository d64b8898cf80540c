"""Settings of a training run: :class:`ZOConfig`, the counterpart of ``transformers.TrainingArguments`` for every method there is."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from zotune import baselines, methods
from zotune.baselines import Baseline, catalog
from zotune.methods.rules import Rule
from zotune.optim.accounting import NEIGHBORS
from zotune.optim.calibration.gains import gain, measurable
from zotune.optim.distributed import Workers
from zotune.optim.distributed.workers import CHECK_EVERY
from zotune.training import accelerate_launch, privacy_options, refusals
from zotune.training.arguments import option

logger = logging.getLogger(__name__)

_METHOD_FIELDS = (
    "eps", "num_directions", "directions_per", "group_size", "direction", "estimator", "fitness", "rank", "interval", "momentum",
    "update_rule", "update_rule_args",
)  # fmt: skip
_JSON_FIELDS = (
    "update_rule_args", "method_args", "lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
)  # fmt: skip


@dataclass
class ZOConfig(TrainingArguments):
    """Settings of a run: `transformers.TrainingArguments` with the method's options beside them.

    Fields of `TrainingArguments` keep their meaning; the defaults below differ. ``learning_rate="auto"`` and ``eps="auto"`` are calibrated
    on the data (:mod:`zotune.optim.calibration.calibrator`); None is the method's own default, the paper's. A learning rate that is not
    given is calibrated where the method supports it, else the method's own, with a warning. Training lasts `max_steps` steps, 1000 when
    neither it nor `num_train_epochs` is given.

    `method` may name a first-order baseline (:mod:`zotune.baselines`): then the learning rate is a number, and `max_grad_norm` and gradient
    checkpointing have their usual meaning.

    Raises:
        ValueError: an unknown method, an option the method does not take, an invalid value, or an option without a meaning here; the
            message names the fix.

    Example:
        >>> config = ZOConfig(output_dir="run", method="lozo", rank=2, interval=50, eps=1e-3, learning_rate=1e-6)
        >>> config.zo_method().name
        'lozo'
    """

    method: str = option("lozo", "The method; `zotune methods` lists them.")
    eps: float | str | None = option(methods.AUTO, "Size of the perturbation, or auto: measured on the first batch.")
    num_directions: int | None = option(None, "Directions per batch, group or example (see directions_per).")
    directions_per: str | None = option(
        None, "Unit with directions of its own: batch, group (neighboring examples, see group_size) or example."
    )
    group_size: int | None = option(None, "Examples per group, with directions_per group.")
    forward_batching: str = option(
        "auto", "batched: all evaluations of a step in one forward; sequential: one after the other; auto: the faster of both."
    )
    direction: str | None = option(None, "Distribution of the directions, e.g. gaussian.")
    estimator: str | None = option(None, "Estimator of the gradient: central, forward or leave-one-out.")
    fitness: str | None = option(
        None,
        "How the points of a step are compared, for the methods that compare pairs of points on the same examples: raw (the loss), z-score "
        "or ranks over the points, or prompt-z-score (within each prompt's group, GRPO's).",
    )
    rank: int | None = option(None, "Rank of a low-rank subspace.")
    interval: int | None = option(None, "Steps between redraws of a low-rank subspace.")
    momentum: float | None = option(None, "Momentum of the method, in [0, 1).")
    update_rule: str | None = option(None, "Update rule: a torch optimizer's name, e.g. SGD.")
    update_rule_args: dict | str | None = option(None, "Arguments of the update rule, as JSON.")
    method_args: dict | str | None = option(None, "Further options of the method's recipe, as JSON.")
    anchor_decay: float = option(
        0.0, "Decay toward the weights that training began with, in place of weight_decay, which is toward 0: less is forgotten."
    )
    dp_epsilon: float | None = option(
        None, "Differential privacy: the ε that the run may spend; the noise is the least that keeps it (needs zotune[privacy])."
    )
    dp_noise_multiplier: float | None = option(
        None, "Differential privacy: the noise's standard deviation over the largest change by one example, in place of dp_epsilon."
    )
    dp_clip: float | None = option(None, "Differential privacy: the size to which each example's coefficient is clipped.")
    dp_delta: float = option(1e-5, "Differential privacy: δ, below one over the number of training examples.")
    dp_neighbors: str = option(
        "add-or-remove",
        "Differential privacy: whether data sets with or without an example are hard to tell apart (add-or-remove), or those with another "
        "one in its place (replace-one, which is stronger).",
        choices=list(NEIGHBORS),
    )
    max_nonfinite_steps: int = option(10, "Consecutive steps with a non-finite loss after which training stops.")

    max_completion_length: int = option(
        256, "Rewards: most tokens of a completion; in `zotune train` by default those of the task's answers, else 256."
    )
    num_generations: int = option(1, "Rewards: completions per prompt and evaluation; more than one needs a temperature.")
    temperature: float = option(0.0, "Rewards: temperature of the completions; 0: greedy.")
    top_p: float = option(1.0, "Rewards: sample among the likeliest tokens that have this probability together.")
    top_k: int = option(0, "Rewards: sample among so many of the likeliest tokens; 0: among all.")
    reward_weights: list[float] | None = option(None, "Rewards: weight of each reward function; 1 each by default.")
    max_failed_rewards: int = option(100, "Rewards: failed rewards (an exception, NaN) of a run after which training stops.")
    kv_cache_memory: str | None = option(
        None, "Rewards: memory (2GiB) of keys and values, by which the rows of a step are cut into parts; 2GB by default."
    )
    log_completions: bool = option(True, "Rewards: log a few completions at each evaluation: console, completions.jsonl, report_to.")
    num_completions_to_print: int = option(4, "Rewards: how many completions an evaluation logs.")

    attribute_every: int = option(10, "Shares of examples: steps between those that are measured; 1: every step, so that all are exact.")
    attribute_examples: int = option(64, "Shares of examples: most validation examples, drawn by seed.")

    parallelism: str = option(
        "auto",
        "What several processes (torchrun, accelerate launch) divide among them: data (the examples of a step), directions, both, or "
        "auto: data, then directions.",
    )
    check_workers_steps: int = option(CHECK_EVERY, "Steps between comparisons of all processes' weights; 0: at the start only.")
    learning_rate: float | str | None = option(
        refusals.NOT_GIVEN, "The learning rate, or auto (the default where supported): calibrated at intervals, times the schedule."
    )
    lr_scheduler_type: str = option(
        "warmup_stable_decay", "The schedule of the learning rate; the default decays linearly over the last 30% of the steps."
    )
    max_steps: int = option(-1, "Training steps; 1000 when num_train_epochs is not given either.")
    num_train_epochs: float | None = option(None, "Passes over the training data, unless max_steps is given.")
    per_device_train_batch_size: int = option(16, "Examples per step (per micro-batch under gradient accumulation).")
    per_device_eval_batch_size: int = option(16, "Examples per evaluation batch.")
    train_sampling_strategy: str = option(
        "stratified",
        "Order of the training examples: stratified (random, with the classes balanced throughout, where there are classes), random, "
        "sequential or group_by_length.",
        choices=list(refusals.SAMPLING),
    )
    max_grad_norm: float = option(0.0, "First-order methods: norm to which gradients are clipped; 0: no clipping.")
    logging_steps: float = option(10, "Steps between log entries.")
    eval_steps: float | None = option(100, "Steps between evaluations (eval_strategy=steps).")
    save_steps: float = option(500, "Steps between checkpoints (save_strategy=steps).")
    save_total_limit: int | None = option(2, "Checkpoints to keep (the best is always kept); 0 keeps all.")
    logging_nan_inf_filter: bool = option(False, "Must stay False: steps without a finite loss are logged as skipped.")
    remove_unused_columns: bool | None = option(
        None, "Drop data columns the model does not take; by default only for tokenized data trained on the model's own loss."
    )

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            setattr(self, name, _number_or_auto(name, getattr(self, name)))
        for name in _JSON_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, _parsed_json(name, value))
        refusals.check(self)
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            given = getattr(self, name)
            if given:
                setattr(self, name, {"use_reentrant": False, **given})
        if self.max_steps == -1 and self.num_train_epochs is None:
            self.max_steps = 1000
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # never read: max_steps takes precedence
        chosen = self.chosen_method()
        privacy_options.check(self, chosen)
        self._settle_learning_rate(chosen)
        missing = accelerate_launch.asked()
        if missing is not None:
            raise ValueError(accelerate_launch.refusal(missing))
        launched = max(Workers().size, int(os.environ.get("WORLD_SIZE") or 1))
        if launched > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else Accelerate looks for a GPU's backend, and makes of each process a run of its own
        super().__post_init__()
        if launched > 1 and self.world_size == 1:
            raise ValueError(
                f"{launched} processes were started, and Accelerate takes each for one alone on {self.device}: set use_cpu=True, or start "
                "them by torchrun."
            )
        if self.world_size > 1 and isinstance(chosen, Baseline):
            raise ValueError(
                f"{self.world_size} processes were launched, and {chosen.name} runs in one: start it without torchrun or accelerate launch."
            )
        if self.mixed_precision != "no":  # asked for by `accelerate launch`
            raise ValueError(f"mixed precision ({self.mixed_precision}) cannot be used: load the model in that dtype.")
        self._n_gpu: int = min(self._n_gpu, 1)  # several visible GPUs would wrap the model in DataParallel
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False

    def chosen_method(self, **options: Any) -> methods.Method | Baseline:
        """The method these fields describe, zeroth-order or a baseline; ``options`` replace some of its options.

        Raises:
            ValueError: an unknown method, or an option or value it does not take.
        """
        baseline = catalog.is_baseline(self.method)
        given = {name: getattr(self, name) for name in _METHOD_FIELDS if getattr(self, name) is not None}
        if given.get("eps") == methods.AUTO and (baseline or methods.get(self.method).subspace.quantized):  # the default: not measured
            del given["eps"]
        if baseline:
            known = baselines.options_of(self.method)
            adam = {name: getattr(self, name) for name in refusals.ADAM_FIELDS if name in known}
            given |= {name: value for name, value in adam.items() if value != refusals.untouched(name)}
        extra: dict[str, Any] = self.method_args if isinstance(self.method_args, dict) else {}
        twice = sorted(given.keys() & extra.keys())
        if twice:
            raise ValueError(f"{twice[0]} is given both as a field and in method_args: give it once.")
        return catalog.get(self.method, **{**given, **extra, **options})

    def zo_method(self, **options: Any) -> methods.Method:
        """As :meth:`chosen_method`; ValueError for a method that is not zeroth-order."""
        chosen = self.chosen_method(**options)
        if isinstance(chosen, Baseline):
            raise ValueError(f"{chosen.name} is not a zeroth-order method: there are {', '.join(methods.names())}.")
        return chosen

    def _settle_learning_rate(self, chosen: methods.Method | Baseline) -> None:
        if isinstance(chosen, Baseline):
            if chosen.package is not None and importlib.util.find_spec(chosen.package) is None:
                raise ModuleNotFoundError(f"{chosen.name} needs the package {chosen.package!r}: install it first.", name=chosen.package)
            if self.learning_rate == methods.AUTO:
                raise ValueError(f"the learning rate of {chosen.name} cannot be calibrated: give a number, or leave it out.")
            if self.learning_rate in (None, refusals.NOT_GIVEN):
                self.learning_rate = chosen.lr or 0.0
            return
        if self.learning_rate == refusals.NOT_GIVEN:
            self.learning_rate = methods.AUTO if measurable(chosen) else chosen.lr
            if self.learning_rate != methods.AUTO:
                logger.warning(
                    f"no learning rate was given, and for method {chosen.name!r} it cannot be calibrated: taking the method's own, "
                    f"{chosen.lr:g}, which suits models of a billion parameters; small models need a far larger one (--learning_rate)."
                )
        if self.learning_rate is None:
            self.learning_rate = chosen.lr
        if self.learning_rate == methods.AUTO:
            gain(chosen, Rule(chosen.update_rule, chosen.update_rule_args), 1.0, 1, 1.0)  # refuses rules without a known scale


def _number_or_auto(name: str, value: float | str | None) -> float | str | None:
    if not isinstance(value, str) or value in (methods.AUTO, refusals.NOT_GIVEN):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number or 'auto', got {value!r}.") from None


def _parsed_json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{name} must be JSON such as {{"nesterov": true}}, got {text!r} ({error}).') from None
    if not isinstance(value, dict):
        raise ValueError(f'{name} must be a JSON object such as {{"nesterov": true}}, got {text!r}.')
    return value


def settings(config: TrainingArguments) -> dict[str, Any]:
    """All fields of a config as JSON-able values; tokens are masked."""
    return json.loads(json.dumps(config.to_dict(), default=str))
