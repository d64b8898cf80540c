"""Methods whose step follows the size of the estimates so far: second moments a number, or one for all."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.shaping import ByRootMeanSquare


@register
def zo_adamw(
    *,
    lr: float = 1e-5,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    betas: tuple[float, float] = (0.9, 0.999),
) -> Method:
    """ZO-AdamW: Adam with decoupled weight decay (2402.11592).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) ĝ²,   θ ← (1 − η λ) θ − η m̂ / (√v̂ + 1e-8)

    λ is the optimizer's ``weight_decay``; at 0 this is ``mezo-adam``. State: m and v, two float32 numbers a weight.
    The published code does not pass the decay on.
    """
    return Method(
        name="zo-adamw",
        title="ZO-AdamW",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="AdamW",
        rule_args={"betas": tuple(betas)},
        rule_state=2,
    )


@register
def zo_rmsprop(
    *,
    lr: float = 1e-5,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    alpha: float = 0.99,
) -> Method:
    """ZO-RMSProp: every number's step is divided by the root of its mean square (2402.11592).

    v ← α v + (1 − α) ĝ²,   θ ← θ − η ĝ / (√v + 1e-8)

    State: v, one float32 number a weight.
    """
    return Method(
        name="zo-rmsprop",
        title="ZO-RMSProp",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="RMSprop",
        rule_args={"alpha": alpha},
        rule_state=1,
    )


@register
def r_adazo(
    *,
    lr: float = 1e-5,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    betas: tuple[float, float] = (0.9, 0.999),
) -> Method:
    """R-AdaZO: Adam whose second moment is that of its first, which is less noisy than the estimate (2502.01014).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) m²,   θ ← θ − η m / √(v + 1e-8)

    As in the paper the moments are not corrected for having started at 0: steps are up to 1/√(1 − β₂) times η, most at the beginning.
    State: m and v, two float32 numbers a weight. The paper draws from the sphere: ``direction="sphere"``.
    """
    return Method(
        name="r-adazo",
        title="R-AdaZO",
        arxiv="2502.01014",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="RAdaZO",
        rule_args={"betas": tuple(betas)},
        rule_state=2,
    )


@register
def meazo(
    *,
    lr: float = 1e-5,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    beta: float = 0.999,
) -> Method:
    """MEAZO: one number as the second moment of all weights (2605.03869).

    v ← β v + (1 − β) Σ c_k² / K²,   θ ← θ − η ĝ / (√v̂ + 1e-8),   v̂ = v / (1 − βᵗ)

    c is common to all weights, so that E[(cZ)²] is all but the same for each: Adam's effect for no memory. State: v and t.
    For one direction this is the paper's. For K > 1 the paper has ((1/K) Σ c_k)² in place of Σ c_k² / K²: the same on average, but it may
    come near 0 and make a first step of any length.
    """
    return Method(
        name="meazo",
        title="MEAZO",
        arxiv="2605.03869",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        shaping=ByRootMeanSquare(beta),
        estimates="direction",
    )
