"""Models without weights, by their configuration: a hub id, a folder, a file, or a well-known shape that comes with the package."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.tasks.objective_choice import is_encoder
from zotune.training.bounds import check_counts
from zotune.training.loading import explained
from zotune.weights.structure import text_config


def shipped() -> dict[str, str]:
    """The hub ids whose configurations come with the package, and their file names."""
    folder = resources.files("zotune.memory") / "configs"
    return {file.name.removesuffix(".json").replace("--", "/"): file.name for file in folder.iterdir() if file.name.endswith(".json")}


def config_of(name: str, *, trust_remote_code: bool = False) -> Any:
    """The ``transformers`` configuration of a model; a shipped one is read without the hub.

    Args:
        name: a folder with a config.json, a config file, one of :func:`shipped` (or the last part of its name), or a hub id.
        trust_remote_code: allow the model's own code.

    Raises:
        FileNotFoundError: there is no such folder, file or hub id.
        ValueError: the file is no model's configuration.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    known = shipped()
    by_last = {each.rpartition("/")[2]: each for each in known}
    if path.is_file():
        with path.open("rb") as opened:
            if opened.read(4) == b"GGUF":
                raise ValueError(
                    f"{name} is a GGUF file, and the memory of training in llama.cpp is not predicted (about that of its inference and the "
                    "adapters): give a folder, a config.json or a hub id."
                )
        try:
            return _read(path.read_text(encoding="utf-8"), name)
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not a model's config.json: it is no text.") from None
    if not path.exists() and (name in known or name in by_last):
        file = known[by_last.get(name, name)]
        return _read((resources.files("zotune.memory") / "configs" / file).read_text(encoding="utf-8"), name)
    config = explained(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    check_counts(config, name)
    return config


def _read(text: str, name: str) -> Any:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not a model's config.json: {error}") from None
    return config_from(values, name)


def config_from(values: Any, name: str) -> Any:
    """The ``transformers`` configuration of a config.json's entries; ``name`` is its source, for messages.

    Raises:
        ValueError: it is no model's configuration.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**{key: value for key, value in values.items() if not key.startswith("_")})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} is not a model's config.json: {' '.join(str(error).split())}") from None
    check_counts(config, name)
    return config


def build(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False, masked: bool = False) -> nn.Module:
    """The model of a configuration, with random weights: a causal language model, or a classifier for an encoder.

    ``masked``: an encoder has the head of a masked language model.

    Raises:
        ValueError: it is another kind of model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    kind = AutoModelForMaskedLM if masked else AutoModelForSequenceClassification if is_encoder(config) else AutoModelForCausalLM
    try:
        return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"the memory of a {config.model_type} model is not predicted, only that of causal, masked and classification models: train a "
            "few steps, whose summary says the peak."
        ) from None


def context_of(config: Any) -> int:
    """The longest sequence the model takes; 0: unknown."""
    return int(getattr(text_config(config), "max_position_embeddings", 0) or 0)


def depth_of(config: Any) -> int:
    """The number of layers; 0: unknown."""
    return int(getattr(text_config(config), "num_hidden_layers", 0) or 0)


def shallow(config: Any, layers: int) -> Any:
    """The configuration of the same model with so many layers."""
    config = copy.deepcopy(config)
    text = text_config(config)
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = kinds[:layers]
    return config
