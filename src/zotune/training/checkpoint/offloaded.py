"""Writing a model whose blocks come and go, a block at a time, in files that ``from_pretrained`` loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zotune.subspaces.coordinate import Coordinate
from zotune.weights.offload.stream import Stream, stream_of
from zotune.weights.quantized_linear import dense_state

INDEX = "model.safetensors.index.json"


class Loaded(NamedTuple):
    """What did not fit when weights were loaded."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def save_model(model: nn.Module, folder: str | Path) -> None:
    """The trained weights as safetensors shards, one a block, with the model's configuration.

    Args:
        model: offloaded; an adapter (PEFT) is saved alone, as always.
        folder: exists.

    Raises:
        ValueError: the model is not offloaded.
    """
    stream, folder = stream_of(model), Path(folder)
    if stream is None:
        raise ValueError("this model is not offloaded: save it as usual.")
    stream.flush()
    if hasattr(model, "peft_config"):
        with stream.empty_state_dicts():  # what an adapter is saved from is in no block's file
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
    """Read back what :func:`save_model` wrote, a shard at a time; into layers in few bits nothing is read.

    Returns:
        The names that no shard holds, and those that the model does not know.
    """
    folder = Path(folder)
    files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    missing: set[str] | None = None
    unexpected: set[str] = set()
    for file in files:
        found = model.load_state_dict(load_file(folder / file), strict=False)
        missing = set(found.missing_keys) if missing is None else missing & set(found.missing_keys)
        unexpected |= set(found.unexpected_keys)
    return Loaded(sorted(missing or ()), sorted(unexpected))


def _shards(model: nn.Module, stream: Stream) -> Iterator[dict[str, Tensor]]:
    """The state dict of a model in pieces: what lies in no block, then every block."""
    blocks = {name: module for part in stream.parts for name, module in zip(part.names, part.modules, strict=True)}
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
    for part in stream.parts:
        tensors: dict[str, Tensor] = {}
        for name, module in zip(part.names, part.modules, strict=True):
            tensors |= dense_state(module, f"{name}.")
        yield _each_once(tensors)


def _each_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without second names of one tensor, which safetensors does not take; contiguous."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), (name, tensor))
    return {name: tensor.contiguous() for name, tensor in found.values()}


def _as_published(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names and shapes that files of this kind of model have."""
    if not hasattr(model, "save_pretrained"):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def coordinates_by_block(model: nn.Module, coordinates: Iterable[Coordinate]) -> list[list[str]]:
    """Names of the coordinates whose weights come and go, by block; none of a model that is in memory."""
    stream = stream_of(model)
    return [] if stream is None else stream.by_block({c.name: c.parameter for c in coordinates})
