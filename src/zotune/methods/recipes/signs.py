"""ZO-SGD that updates by signs, and ZO-SGD that evaluates its update before it is applied."""

from __future__ import annotations

from zotune.methods.coefficients import BySign
from zotune.methods.registry import PER, Fields, register


@register(title="ZO-SGD-Sign", arxiv="2402.11592")
def zo_sgd_sign() -> Fields:
    """ZO-SGD-Sign as published: the sign of every element of the estimate (2402.11592).

    θ ← θ − η sign(ĝ),   ĝ = (1/K) Σ c_k Z_k

    Every element changes by η, whatever the size of the loss difference. State: none.
    The published code updates along sign(c) Z instead: that is ``zo-sgd-scalar-sign``.
    """
    return {"update_rule": "Sign"}


@register(title="ZO-SGD-Sign (scalar)", arxiv="2402.11592", without=("fitness",))
def zo_sgd_scalar_sign() -> Fields:
    """ZO-SGD-Sign as its code has it: the sign of the loss difference, along the direction itself (code of 2402.11592).

    θ ← θ − η (1/K) Σ sign(c_k) Z_k

    A step learns and records one bit per direction. State: none.
    The paper's equation takes the sign of every element instead: that is ``zo-sgd-sign``.
    """
    return {"shaping": BySign(), "estimates": "direction"}


@register(title="ZO-SGD-Cons", arxiv="2402.11592", without=("num_directions", *PER, "fitness"))
def zo_sgd_cons() -> Fields:
    """ZO-SGD-Cons, conservative: of a step forward, none and one back, the one of the lowest loss (2402.11592).

    θ ← the best on the same batch of θ − η ĝ, θ and θ + η ĝ,   ĝ = c Z

    Three evaluations more per step. The journal holds c, 0 or −c, whichever was taken; weight decay comes on top. State: none.
    Departs from the published code, which tries the steps in place and runs AdamW beside.
    """
    return {"conservative": True, "estimates": "descent"}
