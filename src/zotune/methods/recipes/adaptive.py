"""Methods whose step follows the size of past estimates: second moments per element, or one for all, or a prior."""

from __future__ import annotations

from zotune.methods.coefficients import ByRootMeanSquare
from zotune.methods.posterior import ByPosterior
from zotune.methods.recipes.mezo import mezo_adam
from zotune.methods.registry import PER, Fields, register, variant


@variant(mezo_adam, "AdamW", title="ZO-AdamW", arxiv="2402.11592")
def zo_adamw() -> None:
    """ZO-AdamW: Adam with decoupled weight decay (2402.11592).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) ĝ²,   θ ← (1 − η λ) θ − η m̂ / (√v̂ + 1e-8)

    λ is the optimizer's ``weight_decay``; at 0 this is ``mezo-adam``. State: m and v, two float32 elements per weight.
    The published code does not pass the decay on.
    """


@register(title="ZO-RMSProp", arxiv="2402.11592", lr=1e-5)
def zo_rmsprop(*, alpha: float = 0.99) -> Fields:
    """ZO-RMSProp: the step of every element is divided by the root of its mean square (2402.11592).

    v ← α v + (1 − α) ĝ²,   θ ← θ − η ĝ / (√v + 1e-8)

    State: v, one float32 element per weight.
    """
    return {"update_rule": "RMSprop", "update_rule_args": {"alpha": alpha}, "update_rule_state": 1}


@register(title="R-AdaZO", arxiv="2502.01014", lr=1e-5)
def r_adazo(*, betas: tuple[float, float] = (0.9, 0.999)) -> Fields:
    """R-AdaZO: Adam whose second moment is that of its first, which is less noisy than the estimate (2502.01014).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) m²,   θ ← θ − η m / √(v + 1e-8)

    As in the paper the moments are not bias-corrected: steps are up to 1/√(1 − β₂) times η, most at the beginning.
    State: m and v, two float32 elements per weight. The paper draws from the sphere: ``direction="sphere"``.
    """
    return {"update_rule": "RAdaZO", "update_rule_args": {"betas": tuple(betas)}, "update_rule_state": 2}


@register(title="MEAZO", arxiv="2605.03869", without=("fitness",), lr=1e-5)
def meazo(*, beta: float = 0.999) -> Fields:
    """MEAZO: one scalar as the second moment of all weights (2605.03869).

    v ← β v + (1 − β) Σ c_k² / K²,   θ ← θ − η ĝ / (√v̂ + 1e-8),   v̂ = v / (1 − βᵗ)

    c is common to all weights, so E[(cZ)²] is nearly the same for each: Adam's effect without its memory. State: v and t.
    For one direction this is the paper's. For K > 1 the paper has ((1/K) Σ c_k)² in place of Σ c_k² / K². Both have the same mean, but the
    paper's may be near 0, and then the first step has any length.
    """
    return {"shaping": ByRootMeanSquare(beta), "estimates": "direction"}


@register(title="BSZO", arxiv="2601.01452", without=(*PER, "fitness"), eps=1e-4, num_directions=2, estimator="forward")
def bszo(*, prior: float | str = "auto", noise: float | str = "auto", alpha: float = 0.1, reuse: int = 1) -> Fields:
    """BSZO: the slopes along a step's directions by Bayesian inference, with a noise that is learned (2601.01452).

    y_k = (L(θ + εZ_k) − L(θ)) / ε,   a_k ~ N(0, σ_p²),   y_k = a_k + N(0, σ_n²),   θ ← θ − η Σ_k μ_k Z_k,   μ the posterior mean of a

    For every observation, s ← (1 − α) s + α (y − μ)², σ_n² = max(s, σ_0² / 100). A direction's first observation counts its slope as noise,
    since μ is 0 then: so along each direction the rule is a shrinkage of y, by nearly the same factor while σ_n² hardly changes. Then
    ``reuse`` times the least certain direction takes its y again, without an evaluation: the paper's m is num_directions + reuse = 3.
    σ_p and σ_0 (``prior``, ``noise``), in the unit of y, are √(n / 10⁶) for n trained weights. Unlike elsewhere here the directions are
    summed, not averaged. State: s.
    This is version 3 of the published code, its README's. In version 4, and in the paper, observations after the first of each direction
    are new evaluations along the top eigenvector of the posterior covariance. The code adds 1e-10 to variances; here nothing is added.
    """
    return {"shaping": ByPosterior(prior, noise, alpha, reuse), "estimates": "direction"}
