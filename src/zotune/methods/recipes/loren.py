"""LOREN: a rank-one curvature for each parameter, learned by evolution strategies."""

from __future__ import annotations

from zotune.methods.registry import PER, Fields, register
from zotune.subspaces import RankOneScaled


@register(title="LOREN", arxiv="2511.07971", without=(*PER, "estimator", "fitness"), num_directions=10)
def loren(*, damping: float = 0.1, covariance_lr: float = 1e-6, momentum: float = 0.9) -> Fields:
    """LOREN: directions with the covariance of an inverse rank-one curvature, which evolution strategies learn (2511.07971).

    Z_k ~ N(0, (I + ã ãᵀ / ρ)⁻¹),   c_k = (L(θ + εZ_k) − L̄) / ε · K / (K − 1),   m ← β m + (1/K) Σ c_k Z_k,   θ ← θ − η m
    a ← a − η_a (1/K) Σ c_k ∂ log p(Z_k) / ∂a,   ∂ log p(Z) / ∂ã = ã / (ρ + ‖ã‖²) − (ã · Z) Z / ρ,   a ~ N(0, I) at first

    For each parameter; ã is a (n,) repeated for the rows of a matrix, summed over them in ∂a. L̄ is the mean of the K losses, which are the
    only evaluations. ρ = ``damping``, η_a = ``covariance_lr``. State: m, one float32 element per weight, and a, n per matrix.
    After the published code, since the paper's equations could not be read beyond its introduction. As there Z is not divided by √ρ, so
    that ε and η compare with MeZO's, and E‖Z‖² is a little less than d. Departs from it in one update of θ and a per step, where the code
    decays m and moves θ and a once for each direction; in m of vectors too; and in the rate of a: the code's, 1e-3 for L in place of c,
    is 1e-6 here, but it multiplies that by ε² √ρ again, with which a stays as it was drawn. The published η could not be verified.
    """
    return {
        "estimator": "leave-one-out",
        "subspace": RankOneScaled(damping, covariance_lr),
        "update_rule_args": {"momentum": momentum},
        "update_rule_state": 1,
        "estimates": "descent",
    }
