"""The files of a checkpoint: weights and optimizer state as safetensors, all else as JSON."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_bare_model
from torch import nn
from transformers.utils import logging as transformers_logging

from zotune.baselines import FirstOrder
from zotune.io.typed import is_like
from zotune.optim import saved_state
from zotune.optim.optimizer import ZerothOrder
from zotune.training.checkpoint import offloaded, schema
from zotune.training.checkpoint.files import (
    BLOCK_TENSORS,
    FORMAT,
    RNG,
    SCHEDULER,
    STATE,
    STATE_TENSORS,
    load_json,
    other_format,
    save_json,
)
from zotune.weights.offload import stream_of
from zotune.weights.quantized_linear import dense_state, is_quantized


def save_model(folder: Path, model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the weights and the model's config: by `save_pretrained`, or the bare weights of another module."""
    if stream_of(model) is not None:
        offloaded.save_model(model, folder)
        return
    if state_dict is None and is_quantized(model) and not hasattr(model, "peft_config"):
        state_dict = dense_state(model)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if save_pretrained is None:
        save_bare_model(model, str(folder / "model.safetensors"))
        return
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would break the progress bar of the run
    try:
        save_pretrained(folder, **({} if state_dict is None else {"state_dict": state_dict}))
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def truly_missing(model: nn.Module, missing: list[str]) -> list[str]:
    """The names missing from loaded weights, without those tied to a loaded parameter."""
    owner = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    loaded = {key for name, key in owner.items() if name not in set(missing)}
    return [name for name in missing if owner.get(name) not in loaded]


def save_optimizer(folder: Path, optimizer: ZerothOrder | FirstOrder, **extra: Any) -> None:
    """Writes the optimizer's state: tensors as safetensors, the rest and ``extra`` as JSON."""
    run = optimizer.run if isinstance(optimizer, ZerothOrder) else None
    blocks = [] if run is None else offloaded.coordinates_by_block(run.model, run.forward.coordinates)
    away = {name for names in blocks for name in names}
    state = optimizer.state_dict() if run is None else saved_state.save(run, without=away)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.pop("state").items()}
    save_file(tensors, folder / STATE_TENSORS)
    kinds = schema.kinds_of(tensors)
    if run is not None:
        for number, names in enumerate(blocks):  # an offloaded model: one block in memory at a time
            tensors = saved_state.coordinate_tensors(run, names)
            if tensors:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / BLOCK_TENSORS.format(number))
                kinds |= schema.kinds_of(tensors)
    save_json(folder / STATE, {"format": FORMAT, "optimizer": state, "tensors": kinds, **extra})


def load_optimizer(folder: Path, optimizer: ZerothOrder | FirstOrder) -> dict[str, Any]:
    """Restores the state of :func:`save_optimizer`; its extra entries. ValueError for a file of another format."""
    content = load_json(folder / STATE)
    refused = other_format(folder, content.pop("format", None))
    if refused is not None:
        raise ValueError(refused)
    tensors = load_file(folder / STATE_TENSORS)
    for path in sorted(folder.glob(BLOCK_TENSORS.format("*"))):
        tensors |= load_file(path)
    if schema.kinds_of(tensors) != content.pop("tensors", None):
        raise ValueError(f"{folder / STATE_TENSORS} is damaged, its tensors are not those that {STATE} lists: {schema.ANOTHER}.")
    with schema.refused(folder / STATE):
        optimizer.load_state_dict({"state": tensors, **content.pop("optimizer")})
    return content


def save_scheduler(folder: Path, scheduler: Any) -> None:
    """Writes the state of a learning-rate scheduler as JSON; ValueError where it is not plain data."""
    state = scheduler.state_dict()
    try:
        save_json(folder / SCHEDULER, {"type": type(scheduler).__name__, "state": state})
    except TypeError as error:
        raise ValueError(
            f"the state of {type(scheduler).__name__} cannot be written as JSON ({error}): use a scheduler whose "
            "state_dict() holds plain numbers, or save_strategy='no'."
        ) from None


def load_scheduler(folder: Path, scheduler: Any) -> None:
    """Restores the state of :func:`save_scheduler`; ValueError where it is missing or that of another class."""
    content = load_json(folder / SCHEDULER)
    if content["type"] != type(scheduler).__name__:
        raise ValueError(
            f"{folder} was written with the scheduler {content['type']}, not {type(scheduler).__name__}: "
            "resume with the lr_scheduler_type of the run."
        )
    if not is_like(content["state"], scheduler.state_dict()):
        raise ValueError(f"{folder / SCHEDULER} is damaged, its state is none of {content['type']}: {schema.ANOTHER}.")
    with schema.refused(folder / SCHEDULER):
        scheduler.load_state_dict(content["state"])
        if len(scheduler.get_last_lr()) != len(scheduler.optimizer.param_groups):
            raise ValueError("its learning rates are not one for each parameter group")


def save_rng(folder: Path) -> None:
    """Writes the states of the global generators (python, numpy, torch, CUDA) as JSON."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = [_hex(s) for s in torch.cuda.get_rng_state_all()]
    save_json(folder / RNG, state)


def load_rng(folder: Path) -> None:
    """Restores the states of :func:`save_rng`, without those of absent GPUs."""
    state = schema.generators_of(folder)
    random.setstate(state.python_state())
    np.random.set_state(state.numpy_state())
    torch.set_rng_state(schema.tensor_of(state.torch))
    for device, saved in zip(range(torch.cuda.device_count()), state.cuda, strict=False):
        torch.cuda.set_rng_state(schema.tensor_of(saved), device)


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()
