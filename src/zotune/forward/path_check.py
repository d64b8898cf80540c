"""The comparison of low-rank hooks with the general path, on real data, before a run relies on the hooks."""

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

#: ``evaluate(offset, hooks, only)``: losses at θ + offset (None: at θ) and the tables that were read, with hooks or on the general path.
Evaluate = Callable[[Offset | None, bool, Collection[str] | None], tuple[Tensor, list[OverriddenParameters]]]


@tagged("activations")
def agree(fast: Tensor, general: Tensor, base: Tensor, *, half: bool) -> bool:
    """Whether two evaluations of perturbed losses differ by rounding and at most 5% of the perturbation's effect.

    Args:
        fast, general: the losses at one offset, computed in two ways.
        base: the losses at θ.
        half: whether a parameter of the model is in half precision.
    """
    rounding = (2e-2 if half else 1e-5) * (1 + base.abs().max())
    effect = (general - base).abs().max()
    return not bool(torch.isfinite(general).all()) or bool((fast - general).abs().max() <= rounding + 0.05 * effect)


def check(
    evaluate: Evaluate,
    hooks: Sequence[LowRankHook],
    offset: Offset,
    agree: Callable[[Tensor, Tensor, Tensor], bool],
    disable_hooks: Callable[[Sequence[str]], None],
) -> list[str]:
    """Compare hooks and general path in one evaluation each; the names of coordinates whose hooks are disabled, with a warning.

    A weight that is read more often than its layer's forward runs is read from outside the layer: for its dtype, or by a parent that
    computes with it. Those weights are compared one by one first, then all together.

    Args:
        evaluate: evaluates the losses.
        hooks: the hooks to check.
        offset: where to compare.
        agree: whether losses (with hooks, on the general path, at θ) agree.
        disable_hooks: makes the named coordinates take the general path.
    """
    base, _ = evaluate(None, True, None)
    for hook in hooks:
        hook.calls = 0
    fast, _ = evaluate(offset, True, None)
    calls, reads = Counter[str](), Counter[str]()
    for hook in hooks:
        calls[hook.coordinate.name] += hook.calls
    general, tables = evaluate(offset, False, None)
    for table in tables:
        reads.update({table.coordinates[local_name].name: count for local_name, count in table.reads.items()})
    read_outside = sorted(name for name in calls if reads[name] > calls[name])
    # Perturbed alone, by as much as a weight, what the hook misses is the whole difference.
    far = dataclasses.replace(offset, scale=max(offset.scale, 2e-2))
    read_outside = [n for n in read_outside if not agree(evaluate(far, True, {n})[0], evaluate(far, False, {n})[0], base)]
    if read_outside:
        warnings.warn(
            f"{', '.join(read_outside)}: read from outside the layer's own forward, so its low-rank update is folded into the weight every "
            "step instead of added by a hook; results are the same, steps are slower.",
            stacklevel=4,
        )
        disable_hooks(read_outside)
        fast, _ = evaluate(offset, True, None)
    if agree(fast, general, base):
        return read_outside
    names = sorted({hook.coordinate.name for hook in hooks})
    warnings.warn(
        f"the fast and the general evaluation of this model disagree ({fast.mean():.6g} against {general.mean():.6g}); taking the "
        "general one for every layer: results are right, steps are slower.",
        stacklevel=4,
    )
    disable_hooks(names)
    return sorted({*read_outside, *names})
