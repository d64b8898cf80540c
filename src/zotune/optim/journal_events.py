"""Tensors that a subspace made from data, as journal events, so that a run replays without the data.

An event holds pieces of tensors, [name, dtype, shape, first byte, bytes in base64], at most :data:`EVENT_BYTES` of them; a large tensor
takes several events.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Bytes of tensors in an event; base64 adds a third, and a record holds 65535.
EVENT_BYTES = 36_000
#: Elements that a tensor may have beyond those of its parameter.
SPARE = 1 << 16


def events(step: int, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """The events of what was observed at ``step``."""
    pieces: list[list[Any]] = []
    left = EVENT_BYTES
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        at = 0
        while at < len(data):
            taken = data[at : at + left]
            dtype = str(tensor.dtype).removeprefix("torch.")
            pieces.append([name, dtype, list(tensor.shape), at, base64.b64encode(taken).decode()])
            at, left = at + len(taken), left - len(taken) - 2 * len(name) - 80
            if left < 1000:
                yield {"event": "observed", "step": step, "pieces": pieces}
                pieces, left = [], EVENT_BYTES
    yield {"event": "observed", "step": step, "pieces": pieces}


class TensorAssembler:
    """Assembles tensors from events.

    Args:
        parameters: elements of the parameter of each name: what was observed of it is no larger, but for small ones.
    """

    def __init__(self, parameters: Mapping[str, int]) -> None:
        self.parameters = parameters
        self.tensors: dict[str, Tensor] = {}
        self._missing: dict[str, int] = {}

    def add(self, event: Mapping[str, Any]) -> dict[str, Tensor]:
        """Add an event; returns the tensors that it completes.

        Raises:
            ValueError: a tensor that is none of the run, by its name or size.
        """
        whole = {}
        for name, dtype, shape, at, data in event["pieces"]:
            kind = getattr(torch, dtype)
            if at == 0:
                most = SPARE + self.parameters.get(name, -SPARE - 1)
                if not all(side >= 0 for side in shape) or math.prod(shape) > most:
                    raise ValueError(f"{name!r} of shape {shape} is no tensor of this run")
                self.tensors[name] = torch.empty(math.prod(shape), dtype=kind)
                self._missing[name] = self.tensors[name].numel() * kind.itemsize
            piece = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8)
            self.tensors[name].view(torch.uint8)[at : at + len(piece)] = piece
            self._missing[name] -= len(piece)
            if self._missing[name] == 0:
                del self._missing[name]
                whole[name] = self.tensors.pop(name).view(shape)
        return whole
