"""Methods that compare several points of a step: FZOO, evolution strategies, also of quantized weights, and random search."""

from __future__ import annotations

from zotune.methods.best import BestPoint
from zotune.methods.coefficients import ByDeviation
from zotune.methods.registry import PER, Fields, register, variant
from zotune.methods.residual_replay import ResidualReplay
from zotune.subspaces import Codes


@register(
    title="FZOO",
    arxiv="2506.09034",
    without=("fitness",),
    lr=5e-9,  # the code's 5e-5, times the ε that it does not divide by
    eps=1e-4,
    num_directions=8,
    direction="rademacher",
    estimator="forward",
)
def fzoo() -> Fields:
    """FZOO: one-sided differences, and a step normalized by the deviation of the losses (2506.09034).

    c_k = (L(θ + εZ_k) − L(θ)) / ε,   σ = std of the K losses L(θ + εZ_k),   θ ← θ − (η/σ) (1/K) Σ c_k Z_k,   Z_k = ±1

    σ ≈ ε‖∇L‖: the length of a step is about η √(d/K) / ε whatever the loss's unit. State: none.
    Departs from the published code, which evaluates one direction after the other at some 24 passes over the weights, and leaves out the
    division by ε (its η is ours divided by ε).
    """
    return {"shaping": ByDeviation(), "estimates": "direction"}


@register(title="ES (z-scores)", arxiv="2509.24372", without=(*PER, "estimator"), lr=5e-4, num_directions=15, fitness="z-score")
def es() -> Fields:
    """Evolution strategies with z-scored fitness, in antithetic pairs (2509.24372).

    s_i = (L_i − mean) / std over the 2K points θ ± εZ_k,   θ ← θ − η (1/2K) Σ_k (s_k₊ − s_k₋) Z_k

    A population of 30 is K = 15 pairs. To maximize a reward, return its negative as the loss. The unit of the loss, and monotone drifts
    of it, do not matter. State: none.
    Departs from the published code: every parameter draws from its own key (there layers share a seed), and points come in pairs.
    """
    return {"estimates": "direction"}


@variant(es, title="ES (ranks)", arxiv="1703.03864", fitness="ranks")
def es_ranks() -> None:
    """Evolution strategies with centered ranks as fitness, in antithetic pairs (1703.03864).

    s_i = rank of L_i among the 2K points, evenly over [−½, ½],   θ ← θ − η (1/2K) Σ_k (s_k₊ − s_k₋) Z_k

    Only the order of the losses counts: one outlier cannot determine a step. State: none.
    """


@register(
    title="QES",
    arxiv="2602.03120",
    without=(*PER, "eps", "direction", "estimator", "rounding"),
    lr=5e-3,
    num_directions=25,
    fitness="z-score",
)
def qes(*, eps: float = 1e-3, decay: float = 0.9, window: int = 0) -> Fields:
    """QES: evolution strategies on the integers of quantized weights, with error feedback (2602.03120).

    W = Q ⊙ s,   L at Q ± δ_k,   δ_k = σ u_k rounded at random,   x = −η (1/K) Σ c_k δ_k / σ + γ e,   Q ← Q + round(x),   e ← x − round(x)

    Q are the integers of layers in 8 or 4 bits (``--quantize``), s their scales, which stay; so do all other weights. c_k are those of
    ``es``, σ is ``eps`` in units of Q, γ ``decay``. A change that would leave the range of Q is 0, of the pair ± δ_k for both, and e stays
    within ±1.5. It begins uniform in [−½, ½), so that not all elements round at once. State: e, 2 bytes per element of Q.
    The defaults are the published ones for 8 bits, α = 10⁻⁴ and 50 points: η = 2 K α, since there the points are summed. For 4 bits they
    are σ = 5·10⁻³ and α = 3·10⁻⁴, here η = 0.015.
    With ``window`` h above 0, 50 in the paper, e is not stored, but computed from the coefficients of the last h steps: h + 1 times the
    drawing for no state but h·K scalars.
    Departs from the published code, which checks the range for every point alone and clips z-scores at 3.
    To train the scales of weights in 8 bits instead (QZO, 2505.13430) take ``--scheme scales`` with another method.
    """
    if not (isinstance(window, int) and window >= 0):
        raise ValueError(f"window must be a whole number of at least 0, not {window!r}.")
    history = ResidualReplay(window + 1, decay) if window else None
    return {"eps": eps, "subspace": Codes(eps, decay, stored=history is None), "history": history, "estimates": "direction"}


@register(title="RandOpt", arxiv="2603.12228", without=(*PER, "estimator", "fitness"), lr=1.0, num_directions=30)
def randopt(*, radii: tuple[float, ...] = (0.5, 1.0, 2.0)) -> Fields:
    """RandOpt: random search, a step to the best of N sampled points (2603.12228).

    θ ← the best on the same batch of θ and θ + σ_k Z_k,   k = 1, ..., N,   σ_k = ε r_k,   Z_k ~ N(0, I)

    N is ``num_directions``, r_k the ``radii`` in turn. With η = 1 a step ends at the best point; another η multiplies the way there.
    The paper takes one step, on 200 examples, with N = 5000 and these σ (``max_steps=1`` and a batch of that size), and lets the best 1% to
    10% of the points vote on each answer: the journal has the seed and the loss of every point, and ``zotune eval --vote K`` has the best
    K of the last step vote. Further steps go on from the best point. State: none.
    Departs from the published code, which draws σ_k at random and keeps its best points even where θ is better. Its N is 30.
    """
    return {"estimator": "forward", "shaping": BestPoint(tuple(radii)), "estimates": "direction"}
