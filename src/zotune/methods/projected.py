"""Methods whose matrices move in a projected subspace: SubZero, ZO-Muon, TeZO."""

from __future__ import annotations

from typing import Any

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.subspaces import Left, RankOnes, TwoSided


@register
def subzero(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    rank: int = 24,
    interval: int = 1000,
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """SubZero: SGD on a small core between orthonormal bases, redrawn every ``interval`` steps (2410.08989).

    c = (L(W + εσ P S Qᵀ) − L(W − εσ P S Qᵀ)) / 2ε,   W ← W − η c σ P S Qᵀ,   S (r, r) ~ N(0, 1),   σ = √(mn) / r

    P (m, r) and Q (n, r) are the orthonormal factors of Gaussian matrices drawn from keys. σ gives the perturbation the size of MeZO's
    and makes the estimate unbiased, so that η and ε are MeZO's too; the paper's η = 1e-3 and ε = 1e-2 go with the bare P S Qᵀ, whose
    size is r / √(mn) times that. Vectors (bias, norm) as in MeZO. State: P, Q and S, r·(m + n + r) float32 numbers a matrix.
    """
    return Method(
        name="subzero",
        title="SubZero",
        arxiv="2410.08989",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=TwoSided(rank, interval),
        rule=rule,
        rule_args=rule_args or {},
    )


@register
def zo_muon(
    *,
    lr: float = 1e-2,
    eps: float | str = 1e-3,
    num_directions: int | str = 4,
    direction: str = "gaussian",
    estimator: str = "forward",
    rank: int = 64,
    interval: int = 100,
) -> Method:
    """ZO-Muon: the estimate in a projected subspace, orthogonalised (2602.17155).

    c_k = (L(W + ε P u_k) − L(W)) / ε,   W ← W − η P NewtonSchulz₅((1/K) Σ c_k u_k),   P (m, r) orthonormal, u_k (r, n) ~ N(0, 1)

    A vector (bias, norm) is a matrix of one row, whose orthogonal factor is ĝ / ‖ĝ‖: θ ← θ − η ĝ / ‖ĝ‖.
    State: P and u, r·(m + n) float32 numbers a matrix.
    Departs from the published code, which redraws P at every evaluation of a redraw step, so that points and update lie in different
    subspaces, and moves vectors at a rate of its own that no option reaches.
    """
    return Method(
        name="zo-muon",
        title="ZO-Muon",
        arxiv="2602.17155",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Left(rank, interval),
        rule="Orthogonal",
        estimates="descent",
    )


@register
def tezo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    rank: int = 64,
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """TeZO: r numbers a matrix move, the weights of rank-one matrices that are drawn once (2501.19057).

    c = (L(W + ε U diag(τ) Vᵀ) − L(W − ε U diag(τ) Vᵀ)) / 2ε,   W ← W − η c U diag(τ) Vᵀ / r,   τ (r,), U (m, r), V (n, r) ~ N(0, 1)

    U and V stay for the whole run, so what lies outside their r rank-one matrices is out of reach: on average over U and V the estimate
    is the gradient, in a run it is the gradient's part in their span. With a rule such as Adam (TeZO-Adam) its state is r numbers a matrix.
    Vectors (bias, norm) as in MeZO. State: U, V and τ, r·(m + n + 1) float32 numbers a matrix.
    Departs from the paper, which chooses r layer by layer from the spectrum of the weights: here ``rank`` is one number.
    """
    return Method(
        name="tezo",
        title="TeZO",
        arxiv="2501.19057",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=RankOnes(rank),
        rule=rule,
        rule_args=rule_args or {},
        estimates="descent",
        reach="span",
    )
