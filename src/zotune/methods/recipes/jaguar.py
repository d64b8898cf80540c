"""The JAGUAR family: a step perturbs a few chosen coordinates, and updates all that were ever chosen."""

from __future__ import annotations

from zotune.methods.registry import Fields, register, variant


@register(title="JAGUAR-Sign", arxiv="2506.04430", without=("direction", "estimator"), lr=1e-4, eps=5e-3)
def jaguar_sign(update_rule: str = "JaguarSign", *, choice: str = "block:16x16", momentum: float = 0.1) -> Fields:
    """JAGUAR SignSGD: momentum on the coordinates chosen in a step, the sign of all of it as the update (2506.04430).

    δ = (L(θ + τ1_S) − L(θ − τ1_S)) / 2τ,   m_S ← β m_S + (1 − β) δ,   θ ← θ − η sign(m),   τ = eps, β = momentum

    S, drawn anew every step for every parameter: ``choice`` is ``"coordinate"`` (one element), ``"row"``, or ``"block:RxC"`` (R random
    rows by C random columns). State: m, one float32 element per weight.
    All parameters share the two evaluations, each shifted with a random sign of its own, so that what one adds to another's δ averages
    out. Departs from the published code, which zeroes m every step and so loses the memory that the method is about.
    """
    return {
        "direction": choice,
        "update_rule": update_rule,
        "update_rule_args": {"beta": momentum},
        "update_rule_state": 1,
        "estimates": "descent",
    }


@variant(jaguar_sign, "JaguarMuon", title="JAGUAR-Muon", arxiv="2506.04430")
def jaguar_muon() -> None:
    """JAGUAR Muon: the momentum of ``jaguar-sign``, orthogonalized where it is a matrix (2506.04430).

    W ← W − η NewtonSchulz₅(m) for matrices, θ ← θ − η sign(m) for all others; m and S as in ``jaguar-sign``

    State: m, one float32 element per weight.
    """


@register(title="ZO-Jaguar", arxiv="2506.04430", without=("direction", "estimator"), lr=1e-4, eps=5e-3)
def zo_jaguar() -> Fields:
    """ZO-Jaguar: a step evaluates one row per matrix, and every row is updated by its last sign (Evseev et al.; 2506.04430).

    s_i ← sign(L(θ + τ1_i) − L(θ − τ1_i)) for one random row i,   θ ← θ − η s with all rows' signs, η = γτ

    State: s, a signed byte per weight. A row changes as a whole, by ±η: only its sum is trained.
    """
    return {"direction": "row", "update_rule": "PersistentSign", "update_rule_state": 0.25, "estimates": "descent", "reach": "rows"}
