"""The JAGUAR family: a few chosen coordinates are looked at a step, all that were ever looked at move."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register


@register
def jaguar_sign(
    *,
    lr: float = 1e-4,
    eps: float | str = 5e-3,
    num_directions: int = 1,
    choice: str = "block:16x16",
    momentum: float = 0.1,
) -> Method:
    """JAGUAR SignSGD: momentum on the coordinates chosen in a step, the sign of all of it as the update (2506.04430).

    δ = (L(θ + τ1_S) − L(θ − τ1_S)) / 2τ,   m_S ← β m_S + (1 − β) δ,   θ ← θ − η sign(m),   τ = eps, β = momentum

    S, drawn anew every step for every parameter: ``choice`` is ``"coordinate"`` (one number), ``"row"``, or ``"block:RxC"`` (R random
    rows by C random columns). State: m, one float32 number a weight.
    All parameters share the two evaluations, each shifted with a random sign of its own, so that what one adds to another's δ averages
    out. Departs from the published code, which zeroes m every step, and so does without the memory that the method is about.
    """
    return Method(
        name="jaguar-sign",
        title="JAGUAR-Sign",
        arxiv="2506.04430",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=choice,
        rule="JaguarSign",
        rule_args={"beta": momentum},
        rule_state=1,
        estimates="descent",
    )


@register
def jaguar_muon(
    *,
    lr: float = 1e-4,
    eps: float | str = 5e-3,
    num_directions: int = 1,
    choice: str = "block:16x16",
    momentum: float = 0.1,
) -> Method:
    """JAGUAR Muon: the momentum of ``jaguar-sign``, orthogonalised where it is a matrix (2506.04430).

    W ← W − η NewtonSchulz₅(m) for matrices, θ ← θ − η sign(m) for all others; m and S as in ``jaguar-sign``

    State: m, one float32 number a weight.
    """
    return Method(
        name="jaguar-muon",
        title="JAGUAR-Muon",
        arxiv="2506.04430",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=choice,
        rule="JaguarMuon",
        rule_args={"beta": momentum},
        rule_state=1,
        estimates="descent",
    )


@register
def zo_jaguar(
    *,
    lr: float = 1e-4,
    eps: float | str = 5e-3,
    num_directions: int = 1,
) -> Method:
    """ZO-Jaguar: one row of a matrix is looked at a step, and every row moves by the last sign seen of it (Evseev et al.; 2506.04430).

    s_i ← sign(L(θ + τ1_i) − L(θ − τ1_i)) for one random row i,   θ ← θ − η s with all rows' signs, η = γτ

    State: s, a signed byte a weight. A row moves as a whole, by ±η: what a change of its row sums cannot do is out of reach.
    """
    return Method(
        name="zo-jaguar",
        title="ZO-Jaguar",
        arxiv="2506.04430",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction="row",
        rule="PersistentSign",
        rule_state=0.25,
        estimates="descent",
        reach="rows",
    )
