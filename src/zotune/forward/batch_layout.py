"""Stacks: how the rows of one forward are shared out among the points a step evaluates.

A *stack* has G groups of rows, each group under a direction of its own; a group is evaluated at S scales (+ε and −ε, as a rule) with R
rows at each. The rows lie direction-major: for group g, for scale s, the group's R rows. Two ways to fill it from a batch of B examples:

- *shared* directions: every point evaluates the whole batch, so R = B and the batch is copied G · S times;
- *own* directions: the batch is cut into parts of examples and each part has directions of its own; with one direction per example
  G = B, R = 1, and each example is repeated S times. With m directions a part, the part is repeated for each of them; an estimator that
  looks at θ itself looks there once for all m.

A layer that sees an input of G · S · q rows therefore knows which direction a row belongs to, whatever it has been flattened to meanwhile
(tokens, answer options): rows view as (G · S blocks, q).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Point


@dataclass(frozen=True)
class Stack:
    """G groups × S scales × R rows of step ``step`` of run ``seed``.

    Args:
        directions: direction number of each group, (G,); numbers may repeat.
        scales: what each group's direction is multiplied by, (G, S); 0 evaluates θ itself.
        rows: R, rows of a group at one scale.
        source: which row of the batch each row of the stack is a copy of, (G · S · R,).
        losses: which row of the stack holds the loss that an estimator asks for, points × examples.

    Example:
        >>> shared([Point(+1, 0), Point(-1, 0)], 0.1, rows=3, seed=0, step=0).total
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
        """Rows of the stack, G · S · R."""
        return self.blocks * self.rows


@tagged("temporary")
def shared(points: Sequence[Point], eps: float, rows: int, seed: int, step: int) -> Stack:
    """A stack whose points, in order, each see all ``rows`` of the batch."""
    runs = [(direction, [point.sign * eps for point in run]) for direction, run in groupby(points, lambda point: point.direction)]
    if len({len(scales) for _, scales in runs}) > 1:  # directions with different numbers of points: each point is a group
        runs = [(point.direction, [point.sign * eps]) for point in points]
    source = torch.arange(rows).repeat(len(points))
    losses = torch.arange(len(points) * rows).view(len(points), rows)
    return Stack(tuple(d for d, _ in runs), tuple(tuple(scales) for _, scales in runs), rows, source, losses, seed, step)


@tagged("temporary")
def own(signs: Sequence[float], eps: float, owned: Owned, seed: int, step: int) -> Stack:
    """A stack of the pairs (example, direction) of a batch, each at every sign; sign 0 once an example, whatever its directions are."""
    rows = math.gcd(*(len(list(run)) for _, run in groupby(owned.directions)))
    starts = range(0, len(owned), rows)
    groups = [owned.directions[start] for start in starts]
    examples = torch.tensor(owned.examples)
    pairs = torch.arange(len(owned))
    if 0 in signs and len(set(owned.examples)) < len(owned):  # θ itself first, in blocks of R rows, then every pair
        moved = [sign for sign in signs if sign]
        here = sorted(set(owned.examples))
        base = len(here)
        scales = ((0.0,),) * (base // rows) + ((moved[0] * eps,),) * len(groups)
        at_theta = torch.tensor([here.index(example) for example in owned.examples])
        losses = torch.stack([base + pairs if sign else at_theta for sign in signs])
        directions = (groups[0],) * (base // rows) + tuple(groups)
        return Stack(directions, scales, rows, torch.cat([torch.tensor(here), examples]), losses, seed, step)
    count = len(signs)
    source = examples.view(-1, 1, rows).expand(-1, count, -1).reshape(-1)
    losses = torch.arange(len(source)).view(-1, count, rows).transpose(0, 1).reshape(count, -1)
    return Stack(tuple(groups), (tuple(sign * eps for sign in signs),) * len(groups), rows, source, losses, seed, step)


@dataclass(frozen=True)
class Owned:
    """The pairs (example, direction) that a step with own directions evaluates, by direction; a direction's examples lie together.

    Attributes:
        examples: row of the batch, or of the micro-batch.
        directions: number of the direction, not falling.
    """

    examples: tuple[int, ...]
    directions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def between(self, start: int, stop: int) -> Owned:
        """The pairs ``start`` to ``stop - 1``."""
        return self if (start, stop) == (0, len(self)) else Owned(self.examples[start:stop], self.directions[start:stop])


@tagged("temporary")
def share_out(sizes: Sequence[int], parts: int, each: int) -> list[Owned]:
    """For micro-batches of these sizes: their examples cut into ``parts`` runs, ``each`` directions to every run.

    Directions are numbered by part. A part that lies in two micro-batches has its directions in both.
    """
    total, start, shares = sum(sizes), 0, []
    for size in sizes:
        members: dict[int, list[int]] = {}
        for row in range(size):
            members.setdefault((start + row) * parts // total, []).append(row)
        pairs = [(row, part * each + d) for part, rows in members.items() for d in range(each) for row in rows]
        shares.append(Owned(tuple(row for row, _ in pairs), tuple(d for _, d in pairs)))
        start += size
    return shares


# -- batches ----------------------------------------------------------------------------------------------------------------------------


#: Neighboring parts of a batch that have a direction in common where curvature is measured.
SHARED = 2
