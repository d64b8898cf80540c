"""ZO-SGD that moves by signs, and ZO-SGD that looks before it moves."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.shaping import BySign


@register
def zo_sgd_sign(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
) -> Method:
    """ZO-SGD-Sign as published: the sign of every number of the estimate (2402.11592).

    θ ← θ − η sign(ĝ),   ĝ = (1/K) Σ c_k Z_k

    Every number moves by η, whatever the size of the loss difference. State: none.
    The published code moves along sign(c) Z instead: that is ``zo-sgd-scalar-sign``.
    """
    return Method(
        name="zo-sgd-sign",
        title="ZO-SGD-Sign",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="Sign",
    )


@register
def zo_sgd_scalar_sign(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
) -> Method:
    """ZO-SGD-Sign as its code has it: the sign of the loss difference, along the direction itself (code of 2402.11592).

    θ ← θ − η (1/K) Σ sign(c_k) Z_k

    One bit a direction is all that is learnt and kept. State: none.
    The paper's equation takes the sign of every number instead: that is ``zo-sgd-sign``.
    """
    return Method(
        name="zo-sgd-scalar-sign",
        title="ZO-SGD-Sign (scalar)",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        shaping=BySign(),
        estimates="direction",
    )


@register
def zo_sgd_cons(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    direction: str = "gaussian",
    estimator: str = "central",
) -> Method:
    """ZO-SGD-Cons, conservative: of a step forward, none and one back, the one of the lowest loss (2402.11592).

    θ ← the best on the same batch of θ − η ĝ, θ and θ + η ĝ,   ĝ = c Z

    Three evaluations more a step. The journal holds c, 0 or −c, whichever was taken; weight decay comes on top. State: none.
    Departs from the published code, which tries the steps in place and runs AdamW beside.
    """
    return Method(
        name="zo-sgd-cons",
        title="ZO-SGD-Cons",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        direction=direction,
        estimator=estimator,
        conservative=True,
        estimates="descent",
    )
