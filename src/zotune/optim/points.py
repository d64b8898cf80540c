"""The points that a run by random search has evaluated, from its journal."""

from __future__ import annotations

from torch import nn

from zotune import methods
from zotune.methods.best import BestPoint
from zotune.optim.journal import Journal
from zotune.optim.optimizer import ZerothOrder
from zotune.optim.replay import checked_header, replay
from zotune.subspaces.coordinate import Offset


def best_points(model: nn.Module, journal: Journal, count: int) -> tuple[ZerothOrder, list[Offset]]:
    """The best points of the last step of a run of ``randopt``, and the optimizer as it was before that step.

    Args:
        model: the run's base model; it is at the weights before the step afterwards.
        journal: the run's.
        count: of points, at least 1.

    Returns:
        The optimizer, whose ``forward.evaluate(function, point)`` evaluates a point; and the points, the lowest loss first.

    Raises:
        ValueError: another method's run, or the step has fewer points with a loss; whatever :func:`replay` raises.
    """
    header = checked_header(journal)
    method = methods.get(header["method"], **header["options"])
    if not isinstance(method.shaping, BestPoint):
        raise ValueError(f"the best points are those of a run of randopt, and this is one of {method.name}.")
    if len(journal) == 0:
        raise ValueError(f"{journal.path} holds no step.")
    last = len(journal) - 1
    optimizer, steps = replay(model, journal, until=last), 0
    ranked: list[tuple[float, int]] = []
    for record in journal.records():
        if not isinstance(record, dict):
            steps += 1
            if steps > last:
                ranked = sorted((c, k) for k, c in enumerate(record.coefficients) if not record.skipped[k])
        elif steps == last:  # what was measured before the step
            optimizer.apply(record)
    if not 1 <= count <= len(ranked):
        optimizer.remove_hooks()
        raise ValueError(f"the last step of the run has {len(ranked)} points with a loss: give a number from 1 to that, not {count}.")
    length, seed = method.shaping.length, optimizer.seed
    return optimizer, [Offset(optimizer.eps * length(seed, last, k), seed, last, k) for _, k in ranked[:count]]
