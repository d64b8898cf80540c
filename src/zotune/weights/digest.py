"""TODO: digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from zotune.weights import placement
from zotune.weights.external_linear import pieces


def digest(model: nn.Module) -> str:
    """BLAKE2b over names, dtypes, shapes and bytes of all parameters, trainable or not, and of weights in few bits."""

    def one(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        hashed = hashlib.blake2b(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode(), digest_size=16)
        with placement.loaded(tensor):
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            hashed.update(data.numpy().data)
        return hashed.digest()

    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):  # sharded: all processes gather them in one order
        whole = ((name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor) for name, tensor in model.named_parameters())
        return hashlib.blake2b(b"".join(map(one, whole)), digest_size=16).hexdigest()
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing releases the interpreter lock
        packed = [(name, buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in ("codes", "scales", "quantized")]
        packed += pieces(model)
        return hashlib.blake2b(b"".join(pool.map(one, [*model.named_parameters(), *packed])), digest_size=16).hexdigest()


def _hashed(items: Mapping[str, Tensor | str]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for name, item in sorted(items.items()):
        if isinstance(item, str):
            hashed.update(f"{name}|{item}|".encode())
            continue
        item = item.full_tensor() if hasattr(item, "full_tensor") else item  # sharded: a digest of the whole
        hashed.update(f"{name}|{item.dtype}|{tuple(item.shape)}|".encode())
        hashed.update(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
