"""MeZO-SVRG: variance reduction by a snapshot of the weights."""

from __future__ import annotations

from zotune.methods.registry import PER, Fields, register
from zotune.methods.svrg import SVRGSchedule


@register(title="MeZO-SVRG", arxiv="2404.08080", without=(*PER, "fitness"))
def mezo_svrg(*, anchor_batches: int = 8, interval: int = 8, anchor_ratio: float = 1000.0) -> Fields:
    """MeZO-SVRG: the noise of a batch is reduced by evaluating it at a snapshot of the weights too (2404.08080).

    every period:   θ̄ ← θ,   g ← ĝ(θ̄) over M batches along one direction,   θ ← θ − η₁ g
    then ν times:   θ ← θ − η₂ (ĝ_B(θ) − ĝ_B(θ̄) + g),   the first two along the same direction

    η₂ is ``lr``, η₁ = ``anchor_ratio`` · lr, ν = ``interval``. M = ``anchor_batches`` steps, of which only the last updates the weights.
    State: θ̄, one float32 element per weight; g is drawn again from its key and coefficients, where the published code stores a copy.
    Departs from the paper, which takes all training data for g at once: here it comes from M batches of the stream.
    """
    return {"svrg": SVRGSchedule(anchor_batches, interval, anchor_ratio), "update_rule_state": 1}
