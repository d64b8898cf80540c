"""Configurations of models and adapters from elsewhere, held to the size of their weights before a library builds what they describe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from zotune.io import patterns
from zotune.io.text import read_text, shown

#: Most bytes of a configuration.
LONGEST_FILE = 1 << 24
#: Most layers, experts and the like that are built without a look at the weights.
FEW = 200
#: Most of them in a configuration without weights.
MOST = 2000
#: Most iterations of an initialization, which `init_lora_weights` and `loftq_config` may ask for.
MOST_ITERATIONS = 100

_COUNT = re.compile(r"(n|num)_(\w+_)?(layers?|blocks|experts|codebooks|stages)|depth")
# Sizes in an adapter's configuration; none is larger than the largest dimension of its weights.
_SIZES = (
    "r", "init_r", "target_r", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
    "encoder_hidden_size", "encoder_num_layers",
)  # fmt: skip
# Fields with regular expressions, or with names that PEFT puts into some.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")
_FORMS = (r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r"({})\Z")


def check_model(config: Any, folder: Path) -> None:
    """ValueError where a model folder's configuration counts more layers (experts, ...) than its files have tensors."""
    most, name = _largest_count(config)
    if most <= FEW:
        return
    tensors = sum(len(_shapes(path)) for path in folder.glob("*.safetensors"))
    if tensors and most > tensors:
        raise ValueError(f"{folder / 'config.json'} is damaged: {name} is {most}, and the files hold {tensors} tensors.")


def check_counts(config: Any, source: str) -> None:
    """ValueError for a configuration without weights that counts more than :data:`MOST` layers, experts and the like."""
    most, name = _largest_count(config)
    if most > MOST:
        raise ValueError(f"{source}: {name} is {most}, and at most {MOST} are possible.")


def check_adapter(model: nn.Module, folder: Path, weights: Path) -> None:
    """ValueError where an adapter's configuration asks for more than its weights hold, for other modules, or for endless matching.

    Args:
        model: the base model.
        folder: of the adapter.
        weights: its safetensors.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(read_text(path, LONGEST_FILE))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no object.")
    if config.get("megatron_config") is not None:
        raise ValueError(f"{path} asks for megatron_config, which imports another module: it is not supported.")
    _check_iterations(config, path)
    largest = max((side for shape in _shapes(weights).values() for side in shape), default=0)
    if not largest:
        raise ValueError(f"{weights} holds no weights, so the adapter does not fit the model: it lacks all of them.")
    sizes = {name: config.get(name) for name in _SIZES}
    sizes |= {f"rank_pattern {key!r}": value for key, value in _mapping(config.get("rank_pattern")).items()}
    layers, width = sizes["num_layers"], sizes["token_dim"]
    if config.get("peft_type") == "PREFIX_TUNING" and isinstance(layers, int) and isinstance(width, int):
        sizes["2 num_layers token_dim"] = 2 * layers * width
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest):
            raise ValueError(f"{path} is damaged: {shown(name)} is {shown(value)}, and the largest dimension of its weights is {largest}.")
    _check_replication(config.get("layer_replication"), path, weights)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    patterns.rehearse([form.format(each) for each in _texts(config) for form in _FORMS], names, str(path))


def _check_iterations(config: Mapping[str, Any], path: Path) -> None:
    how, loftq = config.get("init_lora_weights"), _mapping(config.get("loftq_config"))
    asked = [("init_lora_weights", how.rpartition("_niter_")[2])] if isinstance(how, str) and "_niter_" in how else []
    asked += [("loftq_config", loftq["loftq_iter"])] if "loftq_iter" in loftq else []
    for name, value in asked:
        if not re.fullmatch(r"\d{1,9}", str(value)) or int(value) > MOST_ITERATIONS:
            raise ValueError(f"{path}: {name} asks for {shown(value)} iterations, and at most {MOST_ITERATIONS} are possible.")


def _check_replication(ranges: Any, path: Path, weights: Path) -> None:
    """The layers that `layer_replication` makes, of which the adapter has weights."""
    if ranges is None:
        return
    try:
        layers = sum(int(end) - int(start) for start, end in ranges)
    except (TypeError, ValueError):
        raise ValueError(f"{path} is damaged: layer_replication is {shown(ranges)}, no list of pairs.") from None
    if layers > len(_shapes(weights)):
        raise ValueError(f"{path} is damaged: layer_replication makes {layers} layers, more than its weights have tensors.")


def _texts(config: Mapping[str, Any]) -> list[str]:
    found: list[Any] = []
    for name in _PATTERNS:
        value = config.get(name)
        found += [value] if isinstance(value, str) else list(value) if isinstance(value, dict | list) else []
    return [each for each in found if isinstance(each, str)]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _largest_count(config: Any) -> tuple[int, str]:
    return max(((value, name) for name, value in _counts(config.to_dict())), default=(0, ""))


def _counts(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and not isinstance(value, bool) and _COUNT.fullmatch(str(name)):
            yield str(name), value


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None
