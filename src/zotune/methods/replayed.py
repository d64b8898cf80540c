"""MeZO with momentum and with Adam, the moments made again from the last steps' coefficients instead of kept."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.replayed import ReplayedAdam, ReplayedMomentum


@register
def replayed_momentum(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    momentum: float = 0.9,
    history: int = 10,
) -> Method:
    """MeZO-momentum without its memory (2305.17333, appendix B.2).

    θ ← θ − η Σ_j β^(t−j) ĝ_j,   j = t − h + 1, ..., t

    ĝ_j is drawn again from the key of step j. State: h·K numbers. An update draws h directions instead of one.
    """
    return Method(
        name="replayed-momentum",
        title="MeZO-momentum, replayed",
        arxiv="2305.17333",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        replayed=ReplayedMomentum(history, momentum),
    )


@register
def replayed_adam(
    *,
    lr: float = 1e-5,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    betas: tuple[float, float] = (0.7, 0.9),
    history: int = 10,
) -> Method:
    """Adam without its memory: AdaMeZO (2605.00650; 2305.17333, appendix B.2).

    m = (1 − β₁) Σ_j β₁^(t−j) ĝ_j,   v = (1 − β₂) Σ_j β₂^(t−j) ĝ_j²,   θ ← θ − η m̂ / (√v̂ + 1e-8),   j = t − h + 1, ..., t

    The corrections count the steps in the sums, at most h, so this is Adam started afresh h steps ago. State: h·K numbers. An update
    draws h directions instead of one, and holds m, v and ĝ_j of one parameter at a time.
    """
    return Method(
        name="replayed-adam",
        title="AdaMeZO",
        arxiv="2605.00650",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        replayed=ReplayedAdam(history, (betas[0], betas[1])),
    )
