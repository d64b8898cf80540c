"""MeZO-SVRG: variance reduction by an anchor."""

from __future__ import annotations

from zotune.anchoring import Anchoring
from zotune.methods.method import Method
from zotune.methods.registry import register


@register
def mezo_svrg(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    anchor_batches: int = 8,
    interval: int = 8,
    anchor_ratio: float = 1000.0,
) -> Method:
    """MeZO-SVRG: what is peculiar to a batch is taken off by looking at it from an anchor too (2404.08080).

    every period:   θ̄ ← θ,   g ← ĝ(θ̄) over M batches along one direction,   θ ← θ − η₁ g
    then ν times:   θ ← θ − η₂ (ĝ_B(θ) − ĝ_B(θ̄) + g),   the first two along the same direction

    η₂ is ``lr``, η₁ = ``anchor_ratio`` · lr, M = ``anchor_batches`` steps without a move but the last's, ν = ``interval``. State: θ̄, one
    float32 number a weight; g is drawn again from its key and coefficients, where the published code keeps it as another copy.
    Departs from the paper, which takes all training data for g at once: here it comes from M batches of the stream.
    """
    return Method(
        name="mezo-svrg",
        title="MeZO-SVRG",
        arxiv="2404.08080",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        anchoring=Anchoring(anchor_batches, interval, anchor_ratio),
        rule_state=1,
    )
