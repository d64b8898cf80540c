"""Adapters of PEFT on disk: whether a saved one is that of a model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from zotune.weights.offload import stream_of

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
