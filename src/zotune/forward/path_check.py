"""The comparison of low-rank hooks with the general way, on real data, before a run relies on them."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from zotune.forward.low_rank_hook import LowRankHook
from zotune.forward.overrides import OverriddenParameters
from zotune.io.memory_tags import tagged
from zotune.subspaces.coordinate import Offset

#: ``evaluate(offset, hooks, only)``: the losses at θ + offset (None: at θ) and the tables that were read, with hooks or the general way.
Evaluate = Callable[[Offset | None, bool, Collection[str] | None], tuple[Tensor, list[OverriddenParameters]]]


@tagged("activations")
def agree(quick: Tensor, slow: Tensor, here: Tensor, *, half: bool) -> bool:
    """Whether two evaluations of perturbed losses differ by rounding and 5% of what the perturbation changes.

    Args:
        quick, slow: the losses at one offset, computed in two ways.
        here: the losses at θ.
        half: whether a parameter of the model is in half precision.
    """
    rounding = (2e-2 if half else 1e-5) * (1 + here.abs().max())
    return not bool(torch.isfinite(slow).all()) or bool((quick - slow).abs().max() <= rounding + 0.05 * (slow - here).abs().max())


def check(
    evaluate: Evaluate,
    low_rank_hooks: Sequence[LowRankHook],
    offset: Offset,
    agree: Callable[[Tensor, Tensor, Tensor], bool],
    disable_hooks: Callable[[Sequence[str]], None],
) -> list[str]:
    """Compare hooks and general way on one evaluation; the names of coordinates that go the general way from now on.

    A weight that is read more often than its layer's forward runs is read by something else, for its dtype perhaps, or to compute with it
    (a parent that reaches in); such weights are compared by themselves first. Then all together. Each finding is a warning.

    Args:
        evaluate: evaluates the losses.
        low_rank_hooks: the hooks in question.
        offset: where to compare.
        agree: whether (with hooks, the general way) agree, given the losses at θ.
        disable_hooks: gives the named coordinates the general way.
    """
    here, _ = evaluate(None, True, None)
    for path in low_rank_hooks:
        path.fired = 0
    quick, _ = evaluate(offset, True, None)
    fired = Counter[str]()
    for path in low_rank_hooks:
        fired[path.coordinate.name] += path.fired
    slow, tables = evaluate(offset, False, None)
    reads = Counter[str]()
    for table in tables:
        reads.update({table.coordinates[local_name].name: count for local_name, count in table.reads.items()})
    reached_into = sorted(name for name in fired if reads[name] > fired[name])
    # Alone, and with a move as large as a weight, what the hook misses is all the difference there is.
    far = dataclasses.replace(offset, scale=max(offset.scale, 2e-2))
    reached_into = [n for n in reached_into if not agree(evaluate(far, True, {n})[0], evaluate(far, False, {n})[0], here)]
    if reached_into:
        warnings.warn(
            f"{', '.join(reached_into)}: read from outside the layer's own forward, so its low-rank update is folded every step "
            "instead of riding beside it; results are the same, steps are slower.",
            stacklevel=4,
        )
        disable_hooks(reached_into)
        quick, _ = evaluate(offset, True, None)
    if agree(quick, slow, here):
        return reached_into
    names = sorted({path.coordinate.name for path in low_rank_hooks})
    warnings.warn(
        f"the fast and the general evaluation of this model disagree ({quick.mean():.6g} against {slow.mean():.6g}); taking the "
        "general one for every layer: results are right, steps are slower.",
        stacklevel=4,
    )
    disable_hooks(names)
    return sorted({*reached_into, *names})
