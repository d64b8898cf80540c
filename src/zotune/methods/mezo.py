"""MeZO and its family: plain torch rules on the estimate in full space."""

from __future__ import annotations

from typing import Any

from zotune.methods.method import Method
from zotune.methods.registry import register


@register
def mezo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """MeZO, or ZO-SGD: plain SGD on the n-SPSA estimate, in full space (2305.17333).

    c = (L(θ + εZ) − L(θ − εZ)) / 2ε,   θ ← θ − η c Z,   Z ~ N(0, I)

    State: none in float32; a 16-bit residual for half-precision weights, so that updates far below their spacing add up.
    Departs from the published code: no weight is written to evaluate, the global generator is not reseeded, every parameter draws from
    its own key, gradient accumulation works, and the seeds and coefficients are on file (the journal).
    With ``rule`` any torch optimiser takes the place of SGD.
    """
    return Method(
        name="mezo",
        title="MeZO",
        arxiv="2305.17333",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule=rule,
        rule_args=rule_args or {},
    )


@register
def mezo_momentum(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    momentum: float = 0.9,
) -> Method:
    """MeZO with heavy-ball momentum, or ZO-SGD-MMT (2305.17333, 2402.11592).

    m ← β m + ĝ,   θ ← θ − η m,   β = 0.9

    State: m, one float32 number a weight.
    """
    return Method(
        name="mezo-momentum",
        title="MeZO-momentum",
        arxiv="2305.17333",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="SGD",
        rule_args={"momentum": momentum},
        rule_state=1,
    )


@register
def mezo_adam(
    *,
    lr: float = 1e-5,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    betas: tuple[float, float] = (0.9, 0.999),
) -> Method:
    """MeZO with Adam, or ZO-Adam (2305.17333).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) ĝ²,   θ ← θ − η m̂ / (√v̂ + 1e-8)

    State: m and v, two float32 numbers a weight.
    """
    return Method(
        name="mezo-adam",
        title="MeZO-Adam",
        arxiv="2305.17333",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="Adam",
        rule_args={"betas": tuple(betas)},
        rule_state=2,
    )
