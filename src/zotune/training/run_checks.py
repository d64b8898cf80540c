"""What the options of a run can be put together with, checked before and after its model is loaded."""

from __future__ import annotations

from torch import nn

from zotune.baselines import Baseline
from zotune.methods import Method
from zotune.training import baseline_runs, schemes
from zotune.training.compatibility import refusal as not_offloaded
from zotune.training.run_config import RunConfig


def check_request(config: RunConfig, method: Method | Baseline) -> None:
    """Settles the number of demonstrations; ValueError for options that contradict each other."""
    if method.name == "icl":
        if config.data.num_demonstrations is None:
            config.data.num_demonstrations = baseline_runs.DEMONSTRATIONS
    elif config.data.num_demonstrations is not None:
        raise ValueError(f"--num_demonstrations is an option of --method icl, not of {method.name}.")
    if config.scheme.scheme != "scales":
        return
    if config.model.quantize != "int8":
        have = "" if config.model.quantize is None else ", where a row has one; in int4 they are inside the product"
        raise ValueError(f"--scheme scales trains the scales of layers stored in 8 bits{have}: it needs --quantize int8.")
    if config.model.offload != "no":
        raise ValueError("--scheme scales writes scales that stay in memory with their layers: leave --offload out.")


def under_scheme(model: nn.Module, config: RunConfig, method: Method | Baseline, *, on_adapter: bool) -> nn.Module:
    """The model with what the scheme trains; a model folder that holds an adapter goes on training that.

    Raises:
        ValueError: scheme, method and model do not go together.
    """
    if on_adapter:
        if config.scheme.scheme in ("head", "bias", "scales") or config.scheme.trainable:
            raise ValueError("the model folder holds an adapter, and training goes on with that: leave --scheme and --trainable out.")
    else:
        model = schemes.apply(model, config.scheme, seed=config.training.seed)
    if config.scheme.scheme == "prefix" and config.training.activation_checkpointing:
        raise ValueError("prefix tuning keeps its keys and values where activation checkpointing drops them: leave one of them out.")
    reason = schemes.refusal(method, model, config.scheme) or (not_offloaded(method, model) if config.model.offload != "no" else None)
    if reason is not None:
        raise ValueError(reason)
    return model
