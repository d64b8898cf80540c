"""Methods that train matrices in a projected subspace: SubZero, P-GAP, ZO-Muon, ZO-MOPI, TeZO."""

from __future__ import annotations

from zotune.methods.registry import Fields, register
from zotune.subspaces import GradientSpan, Left, RankOnes, TwoSided
from zotune.subspaces.base import at_least_one


@register(title="SubZero", arxiv="2410.08989", any_rule=True)
def subzero(*, rank: int = 24, interval: int = 1000) -> Fields:
    """SubZero: SGD on a small core between orthonormal bases, redrawn every ``interval`` steps (2410.08989).

    c = (L(W + εσ P S Qᵀ) − L(W − εσ P S Qᵀ)) / 2ε,   W ← W − η c σ P S Qᵀ,   S (r, r) ~ N(0, 1),   σ = √(mn) / r

    P (m, r) and Q (n, r) are the orthonormal factors of Gaussian matrices drawn from keys. σ gives the perturbation the size of MeZO's
    and makes the estimate unbiased, so that η and ε are MeZO's too; the paper's η = 1e-3 and ε = 1e-2 go with the bare P S Qᵀ, whose
    size is r / √(mn) times that. Vectors (bias, norm) as in MeZO. State: P, Q and S, r·(m + n + r) float32 elements per matrix.
    """
    return {"subspace": TwoSided(rank, interval)}


@register(title="P-GAP", arxiv="2510.18228")
def p_gap(*, rank: int = 128, interval: int = 100, probes: int = 10, delta: float = 2.0, delta_steps: int = 0) -> Fields:
    """P-GAP: SGD on a small core in the span of an estimated gradient, along directions aligned with it (2510.18228).

    G = Σ_j c_j Z_j over h ``probes``, central differences along Gaussian Z_j of all matrices, every ``interval`` steps;   G ≈ P C Qᵀ

    Z = Z₀ − (⟨E, Z₀⟩ − ξ √δ) E,   E = C / ‖C‖,   Z₀ (r, r) ~ N(0, 1),   ξ = ±1;   W ← W − η c σ P Z Qᵀ,   σ = √(mn) / r

    c is the central difference along σ P Z Qᵀ; P (m, r) and Q (n, r) are the leading singular vectors of G. 2h evaluations more at each
    redraw. Vectors (bias, norm) as in MeZO. State: P, Q, C and S, r·(m + n + 2r) float32 elements per matrix. The journal holds the c_j,
    from which P and Q are computed again.
    The equations, h, r (128 to 512 without adapters), the interval and δ = 2, falling to 0, are known from summaries and re-implementations
    that agree; δ falls over ``delta_steps`` steps and stays without. The paper's η and ε without adapters could not be verified, and no
    code of its authors was found: they are MeZO's here, which σ makes fit, as in ``subzero``. Probes perturb matrices alone, by 1e-3.
    A G of h differences in mn dimensions has the cosine √(h / mn) with the gradient, so that P and Q are nearly random.
    """
    subspace = GradientSpan(rank, interval, probes=probes, delta=delta, delta_steps=delta_steps)
    return {"subspace": subspace, "estimates": "descent"}


@register(title="ZO-Muon", arxiv="2602.17155", lr=1e-2, num_directions=4, estimator="forward")
def zo_muon(*, rank: int = 64, interval: int = 100) -> Fields:
    """ZO-Muon: the estimate in a projected subspace, orthogonalized (2602.17155).

    c_k = (L(W + ε P u_k) − L(W)) / ε,   W ← W − η P NewtonSchulz₅((1/K) Σ c_k u_k),   P (m, r) orthonormal, u_k (r, n) ~ N(0, 1)

    A vector (bias, norm) is a matrix of one row, whose orthogonal factor is ĝ / ‖ĝ‖: θ ← θ − η ĝ / ‖ĝ‖.
    State: P and u, r·(m + n) float32 elements per matrix.
    Departs from the published code, which redraws P at every evaluation of a redraw step, so that points and update lie in different
    subspaces, and trains vectors at a rate of its own that no option reaches.
    """
    return {"subspace": Left(rank, interval), "update_rule": "Orthogonal", "estimates": "descent"}


@register(title="ZO-MOPI", arxiv="2605.09034", lr=1e-2, num_directions=8, estimator="forward")
def zo_mopi(*, rank: int = 64, interval: int = 500, components: int = 32, beta: float = 0.0) -> Fields:
    """ZO-MOPI: the leading part of the estimate in a projected subspace, orthogonalized by power iteration (2605.09034).

    c_k = (L(W + ε P u_k) − L(W)) / ε,   M ← β M + (1 − β) (1/K) Σ c_k u_k,   V ← QR(Mᵀ (M V)),   W ← W − η P U Vᵀ

    P (m, r) orthonormal, u_k (r, n) ~ N(0, 1), V (n, ``components``), U = M V with columns of length 1; one step of power iteration per
    step, from the V of the last one. A vector (bias, norm) is updated along M / ‖M‖, as in ``zo-muon``.
    State: P and u, r·(m + n), and V, components·n float32 elements per matrix; with β M too.
    r, ν, K, η and ε are those of the published README, k those of its script, whose β is 0: a run with momentum was not found there,
    though the paper has it. The paper's differences could not be verified; those of the code are one-sided for K > 1.
    Departs from the published code, which draws a random V at every redraw of P, keeps M in the basis of the old P (here M is carried to
    the new one), and trains vectors at a rate of its own. V begins here with rows of the first M.
    """
    at_least_one("components", components)
    share = min(1.0, components / max(1, rank))
    return {
        "subspace": Left(rank, interval),
        "update_rule": "PartialOrthogonal",
        "update_rule_args": {"share": share, "beta": beta},
        "update_rule_state": share + bool(beta),
        "update_rule_vector_state": float(bool(beta)),
        "estimates": "descent",
    }


@register(title="TeZO", arxiv="2501.19057", any_rule=True)
def tezo(*, rank: int = 64) -> Fields:
    """TeZO: r elements per matrix are trained, the weights of rank-one matrices that are drawn once (2501.19057).

    c = (L(W + ε U diag(τ) Vᵀ) − L(W − ε U diag(τ) Vᵀ)) / 2ε,   W ← W − η c U diag(τ) Vᵀ / r,   τ (r,), U (m, r), V (n, r) ~ N(0, 1)

    U and V are fixed for the whole run, and only the span of their r rank-one matrices is trained: the estimate is the gradient's part in
    that span, and the gradient on average over U and V. A rule such as Adam (TeZO-Adam) has a state of r elements per matrix.
    Vectors (bias, norm) as in MeZO. State: U, V and τ, r·(m + n + 1) float32 elements per matrix.
    Departs from the paper, which chooses r for each layer from the spectrum of its weights: here ``rank`` is the same for all.
    """
    return {"subspace": RankOnes(rank), "estimates": "descent", "reach": "span"}
