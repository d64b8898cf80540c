"""The options of private runs in :class:`zotune.ZOConfig`: their values, and options that would read more of the data than is paid for."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.baselines import Baseline
from zotune.methods import AUTO
from zotune.optim import privacy_refusals
from zotune.optim.distributed import Workers
from zotune.optim.privacy import check_neighbors
from zotune.training.arguments import ACCURACY

if TYPE_CHECKING:
    from zotune.training.arguments import DataArguments

#: Fields of a config that act in a private run only, with their defaults.
FIELDS = {"dp_clip": None, "dp_delta": 1e-5, "dp_neighbors": "add-or-remove"}
_SAMPLED = "a private run draws each example with the same probability, by its secret key"
#: Refused in a private run, unless it has one of these values: field → (values, reason).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "train_sampling_strategy": (("stratified",), _SAMPLED),
    "data_seed": ((None,), _SAMPLED),
    "dataloader_drop_last": ((False,), _SAMPLED),
    "dataloader_num_workers": ((0,), _SAMPLED),
    "include_num_input_tokens_seen": (("no", False), "the number of tokens tells which examples were drawn"),
    "max_nonfinite_steps": ((10,), "losses that are not finite count as 0, so that they do not tell of the data"),
}


def is_private(config: Any) -> bool:
    """Whether a config asks for a private run."""
    return config.dp_epsilon is not None or config.dp_noise_multiplier is not None


def check(config: Any, chosen: Any) -> None:
    """ValueError for options of privacy that make no sense, and for others that read training data beside the clipped coefficients.

    Args:
        config: a :class:`zotune.ZOConfig`, its learning rate as given.
        chosen: its method.
    """
    if not is_private(config):
        for name, usual in FIELDS.items():
            if getattr(config, name) != usual:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} would have no effect without dp_epsilon or dp_noise_multiplier: give one."
                )
        return
    _check_values(config)
    if isinstance(chosen, Baseline):
        raise ValueError(
            f"{chosen.name} is not a zeroth-order method, and coefficients of those are clipped: take lozo or mezo (or Opacus for DP-SGD)."
        )
    reason = privacy_refusals.refusal(chosen)
    if reason is None and config.learning_rate in (AUTO, "auto where known"):
        reason = privacy_refusals.MEASURED_RATE
    if reason is None and max(Workers().size, int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        reason = privacy_refusals.SEVERAL
    if reason is not None:
        raise ValueError(reason)
    for name, (allowed, why) in REFUSED.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} cannot be used in a private run: {why}; leave it out.")


def _check_values(config: Any) -> None:
    if config.dp_epsilon is not None and config.dp_noise_multiplier is not None:
        raise ValueError("dp_epsilon and dp_noise_multiplier are two ways to say how much noise there is: give one of them.")
    if config.dp_clip is None:
        raise ValueError("a private run needs dp_clip, the largest coefficient of an example, such as 10: it limits what one example does.")
    for name in ("dp_epsilon", "dp_noise_multiplier", "dp_clip"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value}.")
    if not 0 < config.dp_delta < 1:
        raise ValueError(f"dp_delta must lie between 0 and 1, got {config.dp_delta}.")
    try:
        check_neighbors(config.dp_neighbors)
    except ValueError as error:
        raise ValueError(f"dp_neighbors: {error}") from None


def check_data(data: DataArguments) -> None:
    """ValueError for options of the data that would release something of the training rows without noise."""
    if data.reward or data.objective == ACCURACY:
        raise ValueError(
            "a private run needs a loss that varies smoothly: rewards and accuracies jump by the rounding of the rows beside them, and "
            "completions are logged; leave --reward out, or take --objective choices."
        )
    if data.num_dev:
        raise ValueError("--num_dev evaluates rows of the training data without noise: give rows that are public, by --eval_file.")
    if getattr(data, "attribute", None) is not None:
        raise ValueError("--attribute writes shares of single examples to the journal, without noise: leave it out of a private run.")
    if data.k_shot:
        raise ValueError("--k_shot chooses the training rows by their labels, where one row decides on others: use --num_train.")
    if data.loss_over == "tokens":
        raise ValueError(
            "--loss_over tokens divides an example's loss by the tokens of the others, so that it cannot be clipped: leave it out."
        )
    if data.packing:
        raise ValueError("--packing puts parts of several rows into one block, and a private run protects blocks then: leave it out.")
    if data.dataset_test_split is not None and data.dataset_test_split == (data.dataset_train_split or "train"):
        raise ValueError("--dataset_test_split is the split that is trained on, and evaluations are without noise: name another.")
    for name in ("eval_file", "guard_file"):
        path = getattr(data, name)
        if path is not None and data.train_file is not None and Path(path).resolve() == Path(data.train_file).resolve():
            raise ValueError(
                f"--{name} is the file of the training rows, which would be evaluated without noise: give rows that are public."
            )
