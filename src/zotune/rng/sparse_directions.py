"""Sparse directions: nonzero on a few elements, a row, or rows × columns of every parameter (JAGUAR).

Z = ± 1 on the selected elements and 0 elsewhere. The selection and one sign per parameter are a pure function of the key. With one
parameter c Z does not depend on the sign; with several, the sign turns the other parameters' part of the loss difference into noise of mean
0.

A vector counts as a matrix of one column, a tensor of more dimensions as (first, all others).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, uniform_integers

_BLOCK = re.compile(r"block:([1-9]\d*)x([1-9]\d*)")


def directions(kind: str, shapes: Mapping[str, Sequence[int]]) -> Directions:
    """The distribution called ``kind``, for coordinates of these names and shapes.

    Raises:
        ValueError: there is no such distribution.
    """
    if kind in ("coordinate", "row") or _BLOCK.fullmatch(kind):
        return Chosen(kind, shapes)
    if kind.startswith("block"):
        raise ValueError(f"a direction of rows × columns is spelled 'block:16x16', not {kind!r}.")
    return Directions(kind)


class Chosen(Directions):
    """±1 on chosen coordinates of each parameter, E[Z] = 0.

    - ``coordinate``: one number;
    - ``row``: one row;
    - ``block:RxC``: up to R rows by C columns, drawn with replacement.

    Args:
        kind: one of these.
        shapes: of the coordinates, by name.
    """

    dense = False

    def __init__(self, kind: str, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__("rademacher")
        self.kind = kind
        self.shapes = {name: (shape[0] if shape else 1, math.prod(shape[1:])) for name, shape in shapes.items()}

    @tagged("directions")
    def chosen(self, key: Key, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """(rows, columns, sign) of a key: int64, (R,) and (C,), without duplicates."""
        m, n = self.shapes[key.name]
        rows, columns = (1, 1) if self.kind == "coordinate" else (1, n)
        block = _BLOCK.fullmatch(self.kind)
        if block is not None:
            rows, columns = int(block[1]), int(block[2])
        drawn = uniform_integers(key._replace(purpose="chosen"), slice(0, 1 + rows + min(columns, n)), 31, torch.device("cpu")).long()
        row = (drawn[1 : 1 + rows] * m >> 31).unique()
        column = torch.arange(n) if columns >= n else (drawn[1 + rows :] * n >> 31).unique()
        return row.to(device), column.to(device), 1.0 if int(drawn[0]) & 1 else -1.0

    def scale(self, key: Key, numel: int, device: torch.device) -> float:
        return 1.0

    @tagged("directions")
    def block(self, key: Key, part: slice, device: torch.device, scale: float = 1.0) -> Tensor:
        rows, columns, sign = self.chosen(key, device)
        index = (rows.unsqueeze(1) * self.shapes[key.name][1] + columns).view(-1)
        index = index[(index >= part.start) & (index < part.stop)] - part.start
        return torch.zeros(part.stop - part.start, device=device).index_fill_(0, index, sign * scale)

    @tagged("directions")
    def rows(self, key: Key, rows: Tensor, columns: int) -> Tensor:
        chosen, column, sign = self.chosen(key, rows.device)
        out = torch.zeros(len(rows), columns, device=rows.device)
        out[:, column] = sign
        return out * torch.isin(rows, chosen).unsqueeze(1)

    @tagged("directions")
    def draw_many(self, key: Key, count: int, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        device = torch.device(device)
        whole = slice(0, math.prod(shape))
        each = [self.block(key._replace(direction=key.direction + k), whole, device) for k in range(count)]
        return torch.stack(each).view(count, *shape)

    @tagged("directions")
    def draw_together(self, key: Key, count: int, names: Sequence[str], numels: Sequence[int], device: torch.device) -> Tensor:
        each = [self.draw_many(key._replace(name=name), count, (numel,), device) for name, numel in zip(names, numels, strict=True)]
        return torch.cat(each, dim=1)
