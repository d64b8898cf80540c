"""Stacks: how the rows of one forward are shared out among the points a step evaluates.

A *stack* has G groups of rows, each group under a direction of its own; a group is evaluated at S scales (+ε and −ε, as a rule) with R
rows at each. The rows lie direction-major: for group g, for scale s, the group's R rows. Two ways to fill it from a batch of B examples:

- *shared* directions: every point evaluates the whole batch, so R = B and the batch is copied G · S times;
- *own* directions: the batch is cut into groups of examples and each group has a direction of its own; with a direction per example
  G = B, R = 1, and each example is repeated S times.

A layer that sees an input of G · S · q rows therefore knows which direction a row belongs to, whatever it has been flattened to meanwhile
(tokens, answer options): rows view as (G · S blocks, q).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from zotune.estimators import Point


class NotStackable(Exception):
    """Something cannot be evaluated at several points in one forward; the message says what."""


@dataclass(frozen=True)
class Stack:
    """G groups × S scales × R rows of step ``step`` of run ``seed``.

    Args:
        directions: direction number of each group, (G,); numbers may repeat.
        scales: what each group's direction is multiplied by, (G, S); 0 evaluates θ itself.
        rows: R, rows of a group at one scale.
        own: whether the groups are parts of the batch, not copies of it.

    Example:
        >>> Stack((0, 1), ((0.1, -0.1), (0.1, -0.1)), rows=3, own=False, seed=0, step=0).total
        12
    """

    directions: tuple[int, ...]
    scales: tuple[tuple[float, ...], ...]
    rows: int
    own: bool
    seed: int
    step: int

    @property
    def blocks(self) -> int:
        """G · S."""
        return len(self.directions) * len(self.scales[0])

    @property
    def total(self) -> int:
        """Rows of the stack, G · S · R."""
        return self.blocks * self.rows

    @cached_property
    def source(self) -> Tensor:
        """Which row of the batch each row of the stack is a copy of, (G · S · R,)."""
        signs = len(self.scales[0])
        if not self.own:
            return torch.arange(self.rows).repeat(self.blocks)
        rows = torch.arange(len(self.directions) * self.rows).view(-1, 1, self.rows)
        return rows.expand(-1, signs, -1).reshape(-1)

    def losses(self, losses: Tensor) -> Tensor:
        """Losses of the stacked rows as points × rows: (G · S, B) for shared directions, (S, B) for own ones."""
        if not self.own:
            return losses.view(self.blocks, self.rows)
        signs = len(self.scales[0])
        return losses.view(-1, signs, self.rows).transpose(0, 1).reshape(signs, -1)


def shared(points: Sequence[Point], eps: float, rows: int, seed: int, step: int) -> Stack:
    """A stack whose points, in order, each see all ``rows`` of the batch."""
    runs = [(direction, [point.sign * eps for point in run]) for direction, run in groupby(points, lambda point: point.direction)]
    if len({len(scales) for _, scales in runs}) > 1:  # directions with different numbers of points: each point is a group
        runs = [(point.direction, [point.sign * eps]) for point in points]
    return Stack(tuple(d for d, _ in runs), tuple(tuple(scales) for _, scales in runs), rows, False, seed, step)


def own(signs: Sequence[int], eps: float, directions: Sequence[int], seed: int, step: int) -> Stack:
    """A stack in which row b of the batch belongs to direction ``directions[b]`` (not falling) and is evaluated at each sign."""
    lengths = [len(list(run)) for _, run in groupby(directions)]
    rows = math.gcd(*lengths)
    scales = tuple(sign * eps for sign in signs)
    groups = tuple(directions[::rows])
    return Stack(groups, (scales,) * len(groups), rows, True, seed, step)


# -- batches ----------------------------------------------------------------------------------------------------------------------------


def batch_rows(batch: Any) -> int:
    """Examples of a batch: the size of dimension 0 that all its tensors share.

    Raises:
        NotStackable: it holds no tensors, or they differ in it.
    """
    sizes = {tensor.shape[0] for tensor in _tensors(batch)}
    if len(sizes) != 1:
        what = "holds no tensor" if not sizes else f"holds tensors of {', '.join(map(str, sorted(sizes)))} rows"
        raise NotStackable(f"the batch {what}, so its examples cannot be told apart")
    return sizes.pop()


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.dim() else []
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def take(batch: Any, index: Tensor, rows: int) -> Any:
    """The rows ``index`` of a batch of ``rows`` examples, as a batch of the same type.

    Tensors with a dimension 0 are indexed, and so are lists of ``rows`` things that are no tensors; what is neither stays as it is.
    """
    if isinstance(batch, Tensor):
        return batch.index_select(0, index.to(batch.device)) if batch.dim() else batch
    if isinstance(batch, Mapping):
        taken = {key: take(value, index, rows) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return taken
        twin = copy.copy(batch)
        for key, value in taken.items():
            twin[key] = value
        return twin
    if isinstance(batch, (tuple, list)) and _tensors(batch):
        parts = [take(part, index, rows) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, list) and len(batch) == rows:
        return [batch[row] for row in index.tolist()]
    return batch
