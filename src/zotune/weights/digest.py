"""Digests of a model's weights, which name the base of a journal."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from zotune.weights import placement, quantized_linear
from zotune.weights.computed_linear import ComputedLinear
from zotune.weights.external_linear import pieces

#: Names of the buffers that hold quantized weights.
QUANTIZED = ("codes", "scales", "quantized")


def digest(model: nn.Module) -> str:
    """BLAKE2b over names, dtypes, shapes and bytes of all parameters, trained or not, of quantized weights, and of an engine's factors."""
    return _digest(model, list(model.named_parameters()), [*_packed(model), *_factors(model)])


def digest_of_parameters(model: nn.Module, parameters: Sequence[tuple[str, Tensor]]) -> str:
    """:func:`digest` of some named parameters of a model alone."""
    return _digest(model, parameters, [])


def frozen_digest(model: nn.Module, trained: Collection[Tensor]) -> str | None:
    """:func:`digest` of all but the ``trained`` parameters and quantized weights; None where nothing else is stored."""
    ours = {id(parameter) for parameter in trained}
    rest = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in ours]
    packed = [(name, item) for name, item in _packed(model) if id(item) not in ours]
    return _digest(model, rest, packed) if rest or packed else None


def _digest(model: nn.Module, parameters: Sequence[tuple[str, Tensor]], packed: list[tuple[str, Any]]) -> str:
    def one(item: tuple[str, Tensor | str]) -> bytes:
        name, tensor = item
        if isinstance(tensor, str):
            return _hash_text(f"{name}|{tensor}")
        if isinstance(quantized_linear.owner_of(tensor), ComputedLinear):
            return _hash_text(f"{name}|{tuple(tensor.shape)}")  # a place without values
        with placement.loaded(tensor):
            return _hash(name, tensor).digest()

    if any(placement.is_sharded(parameter) for parameter in model.parameters()):  # all processes gather them in one order
        return _joined(map(one, ((name, _whole(tensor)) for name, tensor in parameters)))
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing releases the interpreter lock
        return _joined(pool.map(one, [*parameters, *packed]))


def _packed(model: nn.Module) -> list[tuple[str, Any]]:
    """What quantized layers and engines store, by name: tensors, or an engine's digest."""
    packed = [(name, buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in QUANTIZED]
    engine = getattr(model, "engine", None)
    return [*packed, *pieces(model), *([] if engine is None else [("engine", engine.digest())])]


def _factors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training has added to the matrices of an engine, by name; nothing for its file alone."""
    for name, module in model.named_modules():
        if isinstance(module, ComputedLinear) and module.left.shape[1]:
            yield f"{name}.left", module.left
            yield f"{name}.right", module.right


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full name, module, name, buffer) of the buffers that a state dict has, without those of quantized weights."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and name not in QUANTIZED:
                yield f"{prefix}.{name}".lstrip("."), module, name, buffer


def buffers_digest(model: nn.Module) -> str:
    """BLAKE2b over :func:`persistent_buffers`, such as the running statistics of a batch norm."""
    return digest_of({name: buffer for name, _, _, buffer in persistent_buffers(model)})


def digest_of(items: Mapping[str, Tensor | str]) -> str:
    """BLAKE2b over named tensors, whole if sharded, and strings, sorted by name."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, item in sorted(items.items()):
        if isinstance(item, str):
            hashed.update(f"{name}|{item}|".encode())
        else:
            _hash(name, _whole(item), hashed)
    return hashed.hexdigest()


def _hash(name: str, tensor: Tensor, hashed: Any = None) -> Any:
    hashed = hashlib.blake2b(digest_size=16) if hashed is None else hashed
    hashed.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed


def _hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _joined(digests: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if placement.is_sharded(tensor) else tensor
