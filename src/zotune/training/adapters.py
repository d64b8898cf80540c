"""Adapters of PEFT on disk: what they hold beside their factors, and whether a saved one is that of a model."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from zotune.weights.offload import stream_of
from zotune.weights.structure import classifier_of

WEIGHTS = "adapter_model.safetensors"


def check_fit(model: nn.Module, folder: Path) -> None:
    """ValueError where the saved adapter of a folder does not hold exactly the weights of the model's adapter.

    PEFT warns, and leaves the adapter as it was initialized.
    """
    from peft import get_peft_model_state_dict

    adapted: Any = model
    stream = stream_of(model)
    with nullcontext() if stream is None else stream.empty_state_dicts():
        wanted = set(get_peft_model_state_dict(adapted, adapter_name=adapted.active_adapter, save_embedding_layers=False))
        others = set(adapted.state_dict())  # PEFT saves embeddings of another size too
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    missing, foreign = sorted(wanted - found), sorted(found - wanted - others)
    if missing or foreign:
        lacks = f"it lacks {len(missing)} of the {len(wanted)} weights of the adapter (such as {missing[0]})" if missing else ""
        has = f"it holds {len(foreign)} that the model has no place for (such as {foreign[0]})" if foreign else ""
        raise ValueError(
            f"{folder / WEIGHTS} does not fit the model: {' and '.join(filter(None, (lacks, has)))}. Give the base model that the adapter "
            "was trained on (base_model_name_or_path in its adapter_config.json)."
        )


def fresh_layers(model: nn.Module, fresh: Collection[str], *, head: bool = False) -> list[str]:
    """The layers of ``fresh`` parameters, which an adapter has to hold, without those within others.

    Args:
        model: before the adapter.
        fresh: names of parameters that the base model's files lack.
        head: with the classifier, in any case; otherwise without it, for it is PEFT that saves it.

    Raises:
        ValueError: a parameter of the model itself, which PEFT cannot save.
    """
    layers = {name.rpartition(".")[0] for name in fresh}
    if "" in layers:
        raise ValueError(f"--scheme lora: an adapter cannot hold the randomly initialized {min(fresh, key=len)}: choose full.")
    classifier = classifier_of(model)
    outer = layers | ({classifier[0]} if classifier is not None else set())
    found = sorted(
        layer for layer in layers if (classifier is None or layer != classifier[0]) and not any(layer.startswith(f"{o}.") for o in outer)
    )
    return [*found, classifier[0]] if head and classifier is not None else found


def base_name(name: str) -> str:
    """The name that a PEFT model's parameter has in the base model."""
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)", "", name.removeprefix("base_model.model."))


def check_fresh(model: nn.Module, fresh: Collection[str], folder: str) -> None:
    """ValueError where neither the base model's files nor the adapter of a folder hold a parameter: it would be random."""
    held = {base_name(name) for name, _ in model.named_parameters() if ".modules_to_save." in name}
    lost = sorted(set(fresh) - held)
    if lost:
        raise ValueError(
            f"the adapter {folder} does not hold {lost[0]}, which the base model's files lack too, so it would be random: train the "
            "adapter anew (--scheme lora saves such layers), or give a base model that has it."
        )
