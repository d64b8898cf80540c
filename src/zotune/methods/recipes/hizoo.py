"""HiZOO: directions scaled by the curvature that three evaluations measure."""

from __future__ import annotations

from zotune.methods.registry import PER, Fields, register, variant
from zotune.subspaces import HessianScaled


@register(title="HiZOO", arxiv="2402.15173", without=(*PER, "estimator", "fitness"))
def hizoo(factored: bool = False, *, smoothing: float = 1e-8, renew_first: bool = False) -> Fields:
    """HiZOO: directions scaled by an estimate of the Hessian's diagonal (2402.15173).

    c = (l₊ − l₋) / 2ε,   θ ← θ − η c H^-½ Z,   l_± = L(θ ± ε H^-½ Z),   l₀ = L(θ),   H begins at 1
    H ← (1 − α) H + α |l₊ + l₋ − 2 l₀| / (2ε²) · H ⊙ Z²,   α = smoothing

    State: H, one float32 element per weight. A step's record holds c and |l₊ + l₋ − 2 l₀| / 2ε².
    H is renewed after the update of θ, as in the paper's equations, where one H scales a step's evaluations and its update. The
    published code renews H in between, so that the update is not along the direction that was evaluated (``renew_first=True``), and
    makes a fourth evaluation only to report it. With the default α the orders hardly differ; with a large one, such as 0.3, they end at
    different weights.
    """
    return {"estimator": "curvature", "subspace": HessianScaled(smoothing, factored, renew_first), "estimates": "descent"}


@variant(hizoo, True, title="HiZOO-L", arxiv="2402.15173")
def hizoo_l() -> None:
    """HiZOO-L: HiZOO with the Hessian's diagonal of a matrix as the product of a row and a column (2402.15173).

    H_ij = r_i c_j / mean r,   r_i ← (1 − α) r_i + α q mean_j (H ⊙ Z²)_ij,   c_j ← (1 − α) c_j + α q mean_i (H ⊙ Z²)_ij,   q as in HiZOO

    State: r and c, m + n float32 elements per matrix; H of a vector is stored whole.
    Otherwise as ``hizoo``.
    """
