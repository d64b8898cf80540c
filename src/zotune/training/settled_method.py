"""A method whose open options are set by data, loss and batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import has_length

from zotune.methods import Method
from zotune.subspaces import Guided
from zotune.training.config import ZOConfig
from zotune.training.samplers import balanced_group_size, classes_of


def settled_method(
    args: ZOConfig, dataset: Any, step_size: int, *, guidable: Callable[[], bool], per_example: Callable[[], bool]
) -> Method:
    """The config's method, with the options that it leaves open.

    Directions per example become directions per group of different classes, or of the batch where the loss is one number for it. A guided
    method's phases are longer for small batches.

    Args:
        args: the config.
        dataset: training examples.
        step_size: examples per step.
        guidable: whether steps can go along output gradients.
        per_example: whether the loss is one number for each example.
    """
    method, found = args.zo_method(), dict[str, Any]()
    extra = args.method_args if isinstance(args.method_args, dict) else {}
    if method.own and args.directions_per is None and "directions_per" not in extra:
        if per_example():
            stratified = args.train_sampling_strategy == "stratified" and has_length(dataset)
            size = balanced_group_size(len(set(classes_of(dataset) or ())) if stratified else 0, step_size)
            found |= {} if size is None else {"directions_per": "group", "group_size": size}
        else:
            warnings.warn(
                "the loss is one number for a batch, so all examples of a step share their directions; with one loss per example a step's "
                "estimate has less noise.",
                stacklevel=2,
            )
            found["directions_per"] = "batch"
    if isinstance(method.subspace, Guided) and args.interval is None and "interval" not in extra and guidable():
        found["interval"] = method.subspace.interval_for(step_size)
    return args.zo_method(**found) if found else method
