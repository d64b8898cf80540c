"""Batches, and the layout of a batched forward: which row is evaluated at which point.

A layout has G groups of rows, each group under its own direction. A group is evaluated at S scales (usually +ε and −ε) with R rows at each.
Rows are ordered by group, then by scale. There are two ways to fill it from a batch of B examples:

- *shared directions*: every point evaluates the whole batch, so R = B and the batch is copied G · S times;
- *directions per example or part*: the batch is cut into parts, each with its own directions. With one direction per example, G = B, R = 1
  and each example is repeated S times. With m directions per part, the part is repeated m times; θ itself is evaluated once for all m.

A layer with an input of G · S · q rows knows the direction of each row, also where a model has flattened tokens or answer options into the
rows: they view as (G · S blocks, q).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Point
from zotune.rng.transfer import send

#: Neighboring parts of a batch that share a direction where curvature is measured.
PARTS_PER_DIRECTION = 2


def examples_of(parts: Sequence[Any] | None) -> int:
    """Examples of a step's micro-batches; 1 where they cannot be told apart."""
    try:
        return sum(map(batch_rows, parts or ())) or 1
    except NotBatchableError:
        return 1


def batch_rows(batch: Any) -> int:
    """Examples of a batch: the size of dimension 0 of all its tensors.

    Raises:
        NotBatchableError: it holds no tensors, or their sizes differ.
    """
    sizes = {tensor.shape[0] for tensor in batch_tensors(batch)}
    if len(sizes) != 1:
        what = "holds no tensor" if not sizes else f"holds tensors of {', '.join(map(str, sorted(sizes)))} rows"
        raise NotBatchableError(f"the batch {what}, so its examples cannot be told apart")
    return sizes.pop()


def batch_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch that have a dimension 0, in order."""
    if isinstance(batch, Tensor):
        return [batch] if batch.dim() else []
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for part in parts for tensor in batch_tensors(part)]


@tagged("temporary")
def take_rows(batch: Any, index: Tensor, rows: int) -> Any:
    """The rows ``index`` of a batch of ``rows`` examples, as a batch of the same type.

    Tensors with a dimension 0 and lists of ``rows`` other objects are indexed; anything else is kept.
    """
    if isinstance(batch, Tensor):
        return batch.index_select(0, send(index, batch.device)) if batch.dim() else batch
    if isinstance(batch, Mapping):
        taken = {key: take_rows(value, index, rows) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return taken
        twin = copy.copy(batch)
        for key, value in taken.items():
            twin[key] = value
        return twin
    if isinstance(batch, (tuple, list)) and batch_tensors(batch):
        parts = [take_rows(part, index, rows) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, list) and len(batch) == rows:
        return [batch[row] for row in index.tolist()]
    return batch


@dataclass(frozen=True)
class BatchLayout:
    """G groups × S scales × R rows of step ``step`` of run ``seed``.

    Args:
        directions: direction number of each group, (G,); numbers may repeat.
        scales: factors of each group's direction, (G, S); 0 evaluates θ itself.
        rows: R, rows of a group at one scale.
        source: row of the batch that each row of the layout copies, (G · S · R,).
        losses: row of the layout that holds each loss of the estimator, points × examples.

    Example:
        >>> shared_layout([Point(+1, 0), Point(-1, 0)], 0.1, rows=3, seed=0, step=0).total
        6
    """

    directions: tuple[int, ...]
    scales: tuple[tuple[float, ...], ...]
    rows: int
    source: Tensor
    losses: Tensor
    seed: int
    step: int

    @property
    def blocks(self) -> int:
        """G · S."""
        return len(self.directions) * len(self.scales[0])

    @property
    def total(self) -> int:
        """Rows in all, G · S · R."""
        return self.blocks * self.rows


@dataclass(frozen=True)
class Assignment:
    """The pairs (example, direction) of a step with directions per example or part, ordered by direction.

    Attributes:
        examples: row of the batch, or of the micro-batch.
        directions: number of the direction, not decreasing.
    """

    examples: tuple[int, ...]
    directions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def slice(self, start: int, stop: int) -> Assignment:
        """The pairs ``start`` to ``stop - 1``."""
        return self if (start, stop) == (0, len(self)) else Assignment(self.examples[start:stop], self.directions[start:stop])


@tagged("temporary")
def shared_layout(points: Sequence[Point], eps: float, rows: int, seed: int, step: int) -> BatchLayout:
    """A layout of ``points``, in order, at each of which all ``rows`` of the batch are evaluated."""
    runs = [(direction, [point.sign * eps for point in run]) for direction, run in groupby(points, lambda point: point.direction)]
    if len({len(scales) for _, scales in runs}) > 1:  # directions with different numbers of points: each point is a group
        runs = [(point.direction, [point.sign * eps]) for point in points]
    source = torch.arange(rows).repeat(len(points))
    losses = torch.arange(len(points) * rows).view(len(points), rows)
    return BatchLayout(tuple(d for d, _ in runs), tuple(tuple(scales) for _, scales in runs), rows, source, losses, seed, step)


@tagged("temporary")
def assigned_layout(signs: Sequence[float], eps: float, assignment: Assignment, seed: int, step: int) -> BatchLayout:
    """A layout of the pairs (example, direction) of a batch, each at every sign; sign 0 once per example, for all its directions."""
    rows = math.gcd(*(len(list(run)) for _, run in groupby(assignment.directions)))
    groups = assignment.directions[::rows]
    examples = torch.tensor(assignment.examples)
    pairs = torch.arange(len(assignment))
    if 0 in signs and len(set(assignment.examples)) < len(assignment):  # θ itself first, in blocks of R rows, then every pair
        nonzero = [sign for sign in signs if sign]
        unique = sorted(set(assignment.examples))
        base = len(unique)
        scales = ((0.0,),) * (base // rows) + ((nonzero[0] * eps,),) * len(groups)
        at_theta = torch.tensor([unique.index(example) for example in assignment.examples])
        losses = torch.stack([base + pairs if sign else at_theta for sign in signs])
        directions = (groups[0],) * (base // rows) + groups
        return BatchLayout(directions, scales, rows, torch.cat([torch.tensor(unique), examples]), losses, seed, step)
    count = len(signs)
    source = examples.view(-1, 1, rows).expand(-1, count, -1).reshape(-1)
    losses = torch.arange(len(source)).view(-1, count, rows).transpose(0, 1).reshape(count, -1)
    return BatchLayout(groups, (tuple(sign * eps for sign in signs),) * len(groups), rows, source, losses, seed, step)


@tagged("temporary")
def assign_directions(sizes: Sequence[int], parts: int, each: int) -> list[Assignment]:
    """For micro-batches of these sizes: their examples cut into ``parts`` runs, ``each`` directions per run.

    Directions are numbered by part. A part that lies in two micro-batches has its directions in both.
    """
    total, start, assignments = sum(sizes), 0, []
    for size in sizes:
        members: dict[int, list[int]] = {}
        for row in range(size):
            members.setdefault((start + row) * parts // total, []).append(row)
        pairs = [(row, part * each + d) for part, rows in members.items() for d in range(each) for row in rows]
        assignments.append(Assignment(tuple(row for row, _ in pairs), tuple(d for _, d in pairs)))
        start += size
    return assignments
