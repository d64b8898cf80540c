"""Options of `zotune train` that were given and would have no effect: refused with the reason by :func:`check_given`.

Which options were given is known on the command line alone. What has no effect anywhere is refused by :mod:`zotune.training.refusals`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from zotune.training.arguments import ACCURACY
from zotune.training.reward_options import REWARD_FIELDS

_ENCODED = "zotune encodes the data and knows their columns and lengths"
_MEASURED = "the metrics are those of the task (--task)"
_PUSHED = "it is an option of --push_to_hub"

#: Options of transformers.TrainingArguments that the command decides by itself.
DECIDED = {
    "do_train": "`zotune train` always trains",
    "do_eval": "`zotune train` evaluates wherever there are evaluation data",
    "do_predict": "`zotune eval` evaluates a trained model",
    "remove_unused_columns": _ENCODED,
    "label_names": _ENCODED,
    "length_column_name": _ENCODED,
    "include_for_metrics": _MEASURED,
    "batch_eval_metrics": _MEASURED,
    "eval_do_concat_batches": _MEASURED,
    "prediction_loss_only": _MEASURED,
    "eval_use_gather_object": _MEASURED,
    "label_smoothing_factor": "it acts on the loss that a model computes from its labels (zotune.ZOTrainer without an objective)",
    "hub_token": "the token is that of `hf auth login` or HF_TOKEN, and stays out of the run's record",
    "local_rank": "torchrun and accelerate launch set it",
}
#: Options of the evaluations during training.
OF_EVALUATIONS = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "per_device_eval_batch_size", "eval_accumulation_steps", "num_eval",
)  # fmt: skip
#: Options of :class:`zotune.ZOConfig` that go with ``attribute``.
ATTRIBUTE_FIELDS = ("attribute_every", "attribute_examples")
_NO_DATA = "there are no evaluation data; pass --eval_file or --num_dev"


def _reports(values: Mapping[str, Any], service: str | None = None) -> bool:
    reporters = values["report_to"]
    reporters = [reporters] if isinstance(reporters, str) else list(reporters or [])
    return any((name not in ("none", "") and service in (None, name)) or name == "all" for name in reporters)


def generates(values: Mapping[str, Any]) -> bool:
    """Whether completions are generated and rewarded."""
    return bool(values["reward"]) and values["reward"] != [ACCURACY]


#: Option → whether it acts by the values of all options, and why it would not.
CONDITIONAL: dict[str, tuple[Callable[[Mapping[str, Any], Collection[str]], bool], str]] = {
    "num_train_epochs": (lambda values, given: "max_steps" not in given, "--max_steps is given too, and takes precedence"),
    "eval_steps": (lambda values, given: str(values["eval_strategy"]) in ("steps", "no"), "--eval_strategy epoch counts epochs"),
    "save_steps": (lambda values, given: str(values["save_strategy"]) == "steps", "it is an option of --save_strategy steps"),
    "save_total_limit": (lambda values, given: str(values["save_strategy"]) != "no", "--save_strategy no saves no checkpoint"),
    "save_only_model": (lambda values, given: str(values["save_strategy"]) != "no", "--save_strategy no saves no checkpoint"),
    "logging_steps": (lambda values, given: str(values["logging_strategy"]) == "steps", "it is an option of --logging_strategy steps"),
    "overwrite_output_dir": (
        lambda values, given: str(values["resume_from_checkpoint"]).lower() in ("none", "false", "no"),
        "--resume_from_checkpoint goes on with the run in the folder",
    ),
    **dict.fromkeys(REWARD_FIELDS, (lambda values, given: generates(values), "it is an option of generated completions (--reward)")),
    **dict.fromkeys(
        ATTRIBUTE_FIELDS, (lambda values, given: bool(values["attribute"]), "it is an option of shares of examples (--attribute)")
    ),
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), (lambda values, given: bool(values["push_to_hub"]), _PUSHED)),
    **dict.fromkeys(
        ("train_sampling_strategy", "data_seed", "dataloader_drop_last"),
        (
            lambda values, given: values["dp_epsilon"] is None and values["dp_noise_multiplier"] is None,
            "a private run draws each example with the same probability, by its secret key",
        ),
    ),
    "run_name": (lambda values, given: _reports(values), "it names the run for --report_to, which is none"),
    "project": (lambda values, given: _reports(values, "trackio"), "it is an option of --report_to trackio"),
    "trackio_space_id": (lambda values, given: _reports(values, "trackio"), "it is an option of --report_to trackio"),
    "trackio_bucket_id": (lambda values, given: _reports(values, "trackio"), "it is an option of --report_to trackio"),
    "trackio_static_space_id": (lambda values, given: _reports(values, "trackio"), "it is an option of --report_to trackio"),
}


def check_given(values: Mapping[str, Any], given: Collection[str], *, evaluated: bool) -> None:
    """ValueError where a given option would have no effect.

    Args:
        values: of all options, by name.
        given: the names of those that were given.
        evaluated: whether there are evaluation data.
    """
    for name in sorted(given):
        reason = DECIDED.get(name)
        if reason is None and name in CONDITIONAL and values[name] not in (None, False):
            acts, why = CONDITIONAL[name]
            reason = None if acts(values, given) else why
        if reason is None and not evaluated and name in OF_EVALUATIONS and _asks(values[name]):
            reason = _NO_DATA
        if reason is not None:
            raise ValueError(f"--{name} would have no effect: {reason}; leave --{name} out.")


def _asks(value: Any) -> bool:
    return value not in (None, False, 0) and str(getattr(value, "value", value)) != "no"
