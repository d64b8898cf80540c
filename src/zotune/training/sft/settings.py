"""TRL's `SFTConfig` as a :class:`~zotune.ZOConfig`: which fields act, which have no effect here, and which are refused.

Read by the names of its fields, so that TRL need not be installed here.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

from transformers import TrainingArguments

from zotune import methods
from zotune.training.config import ZOConfig

logger = logging.getLogger(__name__)

#: Taken over whether the script sets them or not: how much data is trained on, and when.
ALWAYS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "save_total_limit",
)
#: Of the backward pass, and part of TRL's own defaults: not taken over, without a word.
OF_BACKWARD = (
    "bf16", "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
    "remove_unused_columns", "logging_nan_inf_filter",
)  # fmt: skip
_NO_GRADIENT = "there is no gradient"
_FULL_ROWS = "rows are padded to the longest of their batch"
#: Without an effect here, with a warning where the script sets them: field → why.
IGNORED = {
    "learning_rate": "it is one of a first-order optimizer, and zeroth order measures its own; SFTTrainer(..., learning_rate=...) sets it",
    "fp16": "forward passes need no mixed precision; model_init_kwargs={'dtype': 'float16'} loads the model so",
    "max_grad_norm": _NO_GRADIENT,
    "activation_offloading": "no activations are stored",
    "dataset_num_proc": "rows are tokenized in one process",
    "shuffle_dataset": "every epoch is shuffled anyway",
    "padding_free": _FULL_ROWS,
    "pad_to_multiple_of": _FULL_ROWS,
    "dataset_kwargs": "rows with input_ids are taken as they are",
}
#: Refused where the script sets them: field → why, and the fix.
REFUSED = {
    "loss_type": "only the loss 'nll' is known here",
    "truncation_mode": "what is too long loses its end; shorten the rows before",
    "router_aux_loss_coef": "set output_router_logits and router_aux_loss_coef in the model's config",
}
#: Act in :class:`~zotune.training.sft.SFTTrainer` itself.
OF_TRAINER = (
    "model_init_kwargs", "trust_remote_code", "chat_template_path", "dataset_text_field", "eos_token", "pad_token", "max_length",
    "completion_only_loss", "assistant_only_loss", "packing", "packing_strategy", "eval_packing",
)  # fmt: skip


def config_of(args: TrainingArguments, **options: Any) -> ZOConfig:
    """The config of a run with TRL's arguments.

    Args:
        args: TRL's `SFTConfig`, or `TrainingArguments`.
        options: fields of :class:`~zotune.ZOConfig`, which come first.

    Raises:
        ValueError: a field that cannot act; the message names the reason.
    """
    known = {field.name for field in dataclasses.fields(ZOConfig) if field.init}
    changed = changed_fields(args)
    for name, reason in REFUSED.items():
        if name in changed:
            raise ValueError(f"{name}={changed[name]!r} of the SFTConfig cannot be used: {reason}.")
    for name, reason in IGNORED.items():
        if name in changed and name not in options:
            logger.warning("%s=%r of the SFTConfig has no effect: %s.", name, changed[name], reason)
    unknown = sorted(changed.keys() - known - {*IGNORED, *OF_TRAINER, *OF_BACKWARD})
    if unknown:
        raise ValueError(f"{unknown[0]}={changed[unknown[0]]!r} of the SFTConfig is not known here: leave it out.")
    taken = {name: value for name, value in changed.items() if name in known and name not in {*IGNORED, *OF_BACKWARD}}
    taken |= {name: getattr(args, name) for name in ALWAYS}
    return ZOConfig(**{"method": methods.default().name, "output_dir": args.output_dir, **taken, **options})


def changed_fields(args: TrainingArguments) -> dict[str, Any]:
    """Fields whose values are not those that the class gives by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    names = [field.name for field in dataclasses.fields(args) if field.init]
    found = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(usual, name)}
    return found | ({"use_cpu": True} if args.use_cpu else {})
