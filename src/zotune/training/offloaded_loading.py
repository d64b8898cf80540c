"""Loading a pretrained model whose blocks stay on disk until they are needed."""

from __future__ import annotations

import gc
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.weights.offload.blocks import NotOffloadable, offloaded_tensors
from zotune.weights.offload.budget import Needs
from zotune.weights.offload.loading import check_options, chosen_plan, offloaded_blocks
from zotune.weights.offload.stores import DiskStore, FileSpan
from zotune.weights.offload.stream import Stream, stream_of


def load(
    name: str | Path,
    kind: Any = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    blocks: str | Sequence[str] | None = None,
    resident: int = 0,
    prefetch: int = 1,
    max_memory: int | None = None,
    needs: Needs | None = None,
    scratch: str | Path | None = None,
    **options: Any,
) -> Any:
    """A pretrained model whose blocks stay on disk, in the safetensors shards they came in.

    Args:
        name: model folder or hub id.
        kind: an auto class of transformers; None: ``AutoModelForCausalLM``.
        dtype: of the weights in memory; "auto": as stored.
        device: where it computes.
        blocks: as in :func:`offload`.
        resident: number of blocks that stay in memory.
        prefetch: number of blocks loaded ahead.
        max_memory: bytes of ``device``; chooses ``resident`` and ``prefetch``.
        needs: memory of a step beside the weights; None: 15%.
        scratch: folder for a scratch file of the trained weights, as large as those; None: the system's temporary one.
        options: further arguments of ``from_pretrained``.

    Raises:
        ValueError: no blocks are found, the weights are not in safetensors files, or ``max_memory`` is too small.
    """
    import transformers
    from accelerate import init_empty_weights
    from accelerate.hooks import remove_hook_from_module

    kind = transformers.AutoModelForCausalLM if kind is None else kind
    device = torch.device(device)
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(
        name, **{key: options[key] for key in ("trust_remote_code",) if key in options}
    )
    with init_empty_weights():
        empty = kind.from_config(config, dtype=_resolved(dtype, config), **{k: v for k, v in options.items() if k in _OF_CONFIG})
    plan = chosen_plan(empty, resident, prefetch, max_memory, device, blocks, needs)
    resident, prefetch = plan.resident, plan.prefetch
    check_options("disk", resident, prefetch)
    parts = offloaded_blocks(empty, blocks, resident)
    where_to = _device_map(empty, {name for part in parts for name in part.names})
    offloaded = [one.name for some in offloaded_tensors(parts, empty, torch.device("cpu")) for one in some]
    del empty
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        # transformers maps tensors of shards to weights, under whatever names.
        with _without_warning():
            loaded = kind.from_pretrained(name, config=config, dtype=dtype, device_map=where_to, offload_folder=folder, **options)
        model, info = loaded if isinstance(loaded, tuple) else (loaded, None)
        index = _index(model)
        remove_hook_from_module(model, recurse=True)
        for attribute in ("to", "cuda", "hf_device_map", "_offloaded_modules"):
            model.__dict__.pop(attribute, None)
        where = _places({n: entry for n, entry in index.items() if n in set(offloaded)}, folder)
        _load_resident(model, index, set(offloaded), device)
    parts = offloaded_blocks(model, blocks, resident)
    moving = offloaded_tensors(parts, model, device)
    missing = [one.name for some in moving for one in some if one.name not in where]
    if missing:
        raise NotOffloadable(f"{name} has no weight {missing[0]!r} in its files; load it without offloading to see what is wrong with it.")
    store = DiskStore([[one.spec for one in some] for some in moving], where, device, scratch)
    stream = Stream(parts, moving, store, device, prefetch + 1, plan if max_memory is not None else None)
    model.to(device)
    assert stream_of(model) is stream
    gc.collect()
    return model if info is None else (model, info)


@contextmanager
def _without_warning() -> Iterator[None]:
    """Without accelerate's warning of offloaded weights."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_OF_CONFIG = ("attn_implementation", "trust_remote_code")


def _device_map(model: nn.Module, offloaded: set[str], prefix: str = "") -> dict[str, str]:
    """Module → "disk" or "cpu"."""
    placed = dict.fromkeys((prefix + name for name in [*model._parameters, *model._buffers]), "cpu")
    for name, child in model.named_children():
        name = prefix + name
        if name in offloaded:
            placed[name] = "disk"
        elif any(other.startswith(f"{name}.") for other in offloaded):
            placed |= _device_map(child, offloaded, f"{name}.")
        else:
            placed[name] = "cpu"
    return placed


def _resolved(dtype: torch.dtype | str, config: Any) -> torch.dtype:
    if dtype == "auto":
        return config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _index(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of a weight → its shard and its name there, from accelerate's hooks."""
    for module in model.modules():
        hooks = [hook for hook in [getattr(module, "_hf_hook", None)] for hook in getattr(hook, "hooks", [hook])]
        for hook in hooks:
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                return getattr(weights, "dataset", weights).index
    raise NotOffloadable("transformers has put none of this model's weights on disk; load it without offloading.")


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _places(index: dict[str, dict[str, Any]], folder: str) -> dict[str, FileSpan]:
    """The place of each weight's bytes."""
    headers: dict[str, tuple[dict[str, Any], int]] = {}
    found = {}
    for name, entry in index.items():
        path = entry.get("safetensors_file")
        if path is None or Path(path).is_relative_to(folder):
            raise NotOffloadable(
                f"{name} is not in a safetensors file in the form in which the model holds it: load the model once where it fits and "
                "save it with save_pretrained."
            )
        if path not in headers:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                headers[path] = json.loads(file.read(length)), 8 + length
        header, begin = headers[path]
        tensor = header[entry.get("weight_name", name)]
        first, last = tensor["data_offsets"]
        found[name] = FileSpan(str(Path(path).resolve()), begin + first, last - first, _DTYPES[tensor["dtype"]])
    return found


def _load_resident(model: nn.Module, index: dict[str, dict[str, Any]], offloaded: set[str], device: torch.device) -> None:
    """Loads the resident weights of offloaded blocks; the others become tensors without memory."""
    from safetensors import safe_open

    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            continue
        owner_name, _, local = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if name in offloaded:
            value: Tensor = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        else:
            entry = index[name]
            with safe_open(entry["safetensors_file"], framework="pt") as file:
                value = file.get_tensor(entry.get("weight_name", name)).to(parameter.dtype)
        owner._parameters[local] = nn.Parameter(value, requires_grad=parameter.requires_grad)
