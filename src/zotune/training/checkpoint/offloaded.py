"""Checkpoints of offloaded models: written one block at a time, in files that ``from_pretrained`` loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zotune.io.inside import indexed_files
from zotune.subspaces.coordinate import Coordinate
from zotune.weights.offload.stream import Stream, stream_of
from zotune.weights.quantized_linear import dense_state

INDEX = "model.safetensors.index.json"


class Loaded(NamedTuple):
    """Names that no shard holds, and names that the model does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Writes an offloaded model as safetensors shards, one per block, with its configuration; of a PEFT model the adapter alone."""
    stream, folder = stream_of(model), Path(folder)
    assert stream is not None, "the model is offloaded"
    stream.flush()
    if hasattr(model, "peft_config"):
        with stream.empty_state_dicts():  # the adapter's parameters are in no block
            model.save_pretrained(folder)  # type: ignore[operator]
        return
    for part in ("config", "generation_config"):
        if getattr(model, part, None) is not None:
            getattr(model, part).save_pretrained(folder)
    tied = set(getattr(model, "all_tied_weights_keys", ()) or ())
    names: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(_shards(model, stream)):
        tensors = _as_published(model, {name: t for name, t in tensors.items() if name not in tied})
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=1) + "\n")


def load_model(model: nn.Module, folder: str | Path) -> Loaded:
    """Loads the shards of :func:`save_model`, one at a time; quantized layers load nothing."""
    folder = Path(folder)
    files = indexed_files(folder / INDEX)
    missing: set[str] | None = None
    unexpected: set[str] = set()
    for file in files:
        found = model.load_state_dict(load_file(file), strict=False)
        missing = set(found.missing_keys) if missing is None else missing & set(found.missing_keys)
        unexpected |= set(found.unexpected_keys)
    return Loaded(sorted(missing or ()), sorted(unexpected))


def _shards(model: nn.Module, stream: Stream) -> Iterator[dict[str, Tensor]]:
    """The state dict in parts: the parameters outside of the blocks, then each block."""
    blocks = {name: module for part in stream.blocks for name, module in zip(part.names, part.modules, strict=True)}
    rest: dict[str, Tensor] = {}

    def gather(module: nn.Module, prefix: str) -> None:
        persistent = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        for name in [*module._parameters, *persistent]:
            tensor = getattr(module, name)
            if tensor is not None:
                rest[prefix + name] = tensor.detach()
        for name, child in module.named_children():
            name = prefix + name
            if name in blocks:
                continue
            if any(other.startswith(f"{name}.") for other in blocks):
                gather(child, f"{name}.")
            else:
                rest.update(dense_state(child, f"{name}."))

    gather(model, "")
    yield _each_once(rest)
    for part in stream.blocks:
        tensors: dict[str, Tensor] = {}
        for name, module in zip(part.names, part.modules, strict=True):
            tensors |= dense_state(module, f"{name}.")
        yield _each_once(tensors)


def _each_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and one name per tensor, as safetensors requires."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), (name, tensor))
    return {name: tensor.contiguous() for name, tensor in found.values()}


def _as_published(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names and shapes of published files of this architecture."""
    if not hasattr(model, "save_pretrained"):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def coordinates_by_block(model: nn.Module, coordinates: Iterable[Coordinate]) -> list[list[str]]:
    """Names of the coordinates of offloaded weights, by block; empty without offloading."""
    stream = stream_of(model)
    return [] if stream is None else stream.by_block({c.name: c.parameter for c in coordinates})
