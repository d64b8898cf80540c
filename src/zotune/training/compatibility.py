"""Which methods can train weights that are away between evaluations."""

from __future__ import annotations

from typing import Any

from torch import nn

from zotune.methods import Method
from zotune.subspaces import Full, LowRank
from zotune.weights import placement


def refusal(method: Method | Any, model: nn.Module) -> str | None:
    """Why a method cannot train an offloaded model, in one sentence with the fix; None when it can."""
    if not isinstance(method, Method):
        if getattr(method, "kind", "backward") != "backward":
            return None
        return f"{method.name} goes backward through all weights at once, so they cannot be offloaded: choose a zeroth-order method."
    trained = [p for p in model.parameters() if p.requires_grad and placement.offload_handle(p) is not None]
    if not trained:
        return None
    if any(getattr(placement.offload_handle(p), "lossy", False) for p in trained):
        return "the weights are kept in fewer bits while they are away, so they cannot be trained: train an adapter (--scheme lora)."
    plain = isinstance(method.subspace, LowRank) or type(method.subspace) is Full
    if not plain or method.svrg is not None or method.estimator == "curvature":
        return (
            f"{method.name} looks at weights between evaluations, when they are away: choose a low-rank method such as lozo, mezo, or an "
            "adapter (--scheme lora)."
        )
    return None
