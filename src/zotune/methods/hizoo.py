"""HiZOO: directions scaled by what three evaluations say of the curvature."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.subspaces import Curved


@register
def hizoo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    smoothing: float = 1e-8,
) -> Method:
    """HiZOO: directions scaled by an estimate of the Hessian's diagonal (2402.15173).

    c = (l₊ − l₋) / 2ε,   θ ← θ − η c H^-½ Z,   l_± = L(θ ± ε H^-½ Z),   l₀ = L(θ),   H begins at 1
    H ← (1 − α) H + α |l₊ + l₋ − 2 l₀| / (2ε²) · H ⊙ Z²,   α = smoothing

    State: H, one float32 number a weight. A step's record holds c and |l₊ + l₋ − 2 l₀| / 2ε².
    Departs from the published code, which renews H between the evaluations and the update of a step, so that the update is not along
    the direction that was evaluated, and makes a fourth evaluation only to report it.
    """
    return Method(
        name="hizoo",
        title="HiZOO",
        arxiv="2402.15173",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator="curvature",
        subspace=Curved(smoothing),
        estimates="descent",
    )


@register
def hizoo_l(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    smoothing: float = 1e-8,
) -> Method:
    """HiZOO-L: HiZOO with the Hessian's diagonal of a matrix as the product of a row and a column (2402.15173).

    H_ij = r_i c_j / mean r,   r_i ← (1 − α) r_i + α q mean_j (H ⊙ Z²)_ij,   c_j ← (1 − α) c_j + α q mean_i (H ⊙ Z²)_ij,   q as in HiZOO

    State: r and c, m + n float32 numbers a matrix (vectors keep their H whole): next to nothing in place of another copy of the weights.
    Otherwise as ``hizoo``.
    """
    return Method(
        name="hizoo-l",
        title="HiZOO-L",
        arxiv="2402.15173",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator="curvature",
        subspace=Curved(smoothing, factored=True),
        estimates="descent",
    )
