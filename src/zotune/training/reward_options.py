"""The options of rewards in :class:`zotune.ZOConfig`: their values, and that they are given with a reward alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from zotune.baselines import Baseline
from zotune.io.sizes import parse_size
from zotune.methods import Method

#: Fields of a config that act with a reward only.
REWARD_FIELDS = (
    "max_completion_length", "num_generations", "temperature", "top_p", "top_k", "reward_weights", "max_failed_rewards",
    "kv_cache_memory", "log_completions", "num_completions_to_print",
)  # fmt: skip
# Fields of sampled completions.
_SAMPLED = {"top_p": 1.0, "top_k": 0, "num_generations": 1}


def check(config: Any) -> None:
    """ValueError for a value that makes no sense, or one without an effect beside the others."""
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {config.top_p}.")
    if not math.isfinite(config.temperature):
        raise ValueError(f"temperature must be a finite number, got {config.temperature}.")
    for name, usual in _SAMPLED.items():
        value = getattr(config, name)
        if value != usual and config.temperature == 0:
            raise ValueError(
                f"{name}={value} cannot be used: completions are greedy, so it has no effect; set temperature=1.0, or leave it out."
            )
    weights = config.reward_weights
    if weights is not None and (not weights or not all(isinstance(each, int | float) and math.isfinite(each) for each in weights)):
        raise ValueError(f"reward_weights must be finite numbers, one for each reward function, got {weights!r}.")
    if weights is not None and not any(weights):
        raise ValueError("reward_weights are all 0, so no completion is better than another: give one of them another value.")
    if config.kv_cache_memory is not None:
        try:
            parse_size(config.kv_cache_memory)
        except ValueError as error:
            raise ValueError(f"kv_cache_memory: {error}") from None
    if not config.log_completions and config.num_completions_to_print != usual_of(config, "num_completions_to_print"):
        raise ValueError("num_completions_to_print would have no effect: it is an option of log_completions; leave one of them out.")


def check_rewarded(config: Any) -> None:
    """ValueError for an option of rewards in a run without one."""
    for name in REWARD_FIELDS:
        value = getattr(config, name)
        if value != usual_of(config, name):
            raise ValueError(
                f"{name}={value!r} cannot be used: it is an option of rewards, and there is none; pass reward_funcs (--reward), or leave "
                "it out."
            )


def check_no_gradient(method: Method | Baseline) -> None:
    """ValueError for a method that differentiates, of an objective through which no gradient passes."""
    backward = isinstance(method, Baseline) and method.kind == "backward"
    if backward or (isinstance(method, Method) and method.estimator == "tangent"):
        how = "goes backward" if backward else "differentiates forward"
        raise ValueError(f"{method.name} {how}, and no gradient passes through a reward or an accuracy: choose a method such as lozo.")


def usual_of(config: Any, name: str) -> Any:
    """The default of a config's field."""
    return next(field.default for field in dataclasses.fields(config) if field.name == name)
