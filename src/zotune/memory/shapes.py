"""Models by their configuration alone: a hub id, a folder, a file, or one of the well-known shapes that come with the package."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.tasks.preparation import is_encoder
from zotune.training.loading import explained


def shipped() -> dict[str, str]:
    """Hub ids whose shapes come with the package, to their file's name."""
    folder = resources.files("zotune.memory") / "configs"
    return {file.name.removesuffix(".json").replace("--", "/"): file.name for file in folder.iterdir() if file.name.endswith(".json")}


def config_of(name: str, *, trust_remote_code: bool = False) -> Any:
    """The ``transformers`` configuration of a model; no weight is read, and for a shipped one nothing is asked of the hub.

    Args:
        name: a folder with a config.json, a config file, one of :func:`shipped` (the last part of its name will do), or a hub id.
        trust_remote_code: whether a model's own code may run.

    Raises:
        FileNotFoundError: there is no such folder, file or hub id. ValueError: the file is no model's configuration.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    known = shipped()
    by_last = {each.rpartition("/")[2]: each for each in known}
    if path.is_file():
        return _read(path.read_text(encoding="utf-8"), name)
    if not path.exists() and (name in known or name in by_last):
        file = known[by_last.get(name, name)]
        return _read((resources.files("zotune.memory") / "configs" / file).read_text(encoding="utf-8"), name)
    return explained(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))


def _read(text: str, name: str) -> Any:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not a model's config.json: {error}") from None
    return config_from(values, name)


def config_from(values: Any, name: str) -> Any:
    """The ``transformers`` configuration of a mapping such as a config.json holds.

    Args:
        values: its entries, ``model_type`` among them.
        name: where it is from, for messages.

    Raises:
        ValueError: it is no model's configuration.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**{key: value for key, value in values.items() if not key.startswith("_")})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} is not a model's config.json: {' '.join(str(error).split())}") from None


def build(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a configuration with its head: a classifier for an encoder, else a causal language model. Random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if is_encoder(config) else AutoModelForCausalLM
    return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_of(config: Any) -> int:
    """The longest sequence the model takes, 0 where its configuration does not say."""
    return int(getattr(_text(config), "max_position_embeddings", 0) or 0)


def depth_of(config: Any) -> int:
    """The number of layers, 0 where the configuration does not say."""
    return int(getattr(_text(config), "num_hidden_layers", 0) or 0)


def shallow(config: Any, layers: int) -> Any:
    """The configuration of the same model with so many layers."""
    config = copy.deepcopy(config)
    text = _text(config)
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = kinds[:layers]
    return config
