"""DiZO: MeZO, and from time to time a search for how far layers are moved."""

from __future__ import annotations

from zotune.methods.layer_projection import LayerProjection
from zotune.methods.registry import Fields, register


@register(title="DiZO", arxiv="2502.03304")
def dizo(
    *,
    interval: int = 50,
    iterations: int = 10,
    projection_eps: float = 0.1,
    projection_lr: float = 2.0,
    clip: float = 0.2,
    projected: str = "key-value",
) -> Fields:
    """DiZO: MeZO that searches from time to time for how far each layer is to be from where it began (2502.03304).

    every κ steps, for the projected layers l, Δ_l = θ_l − θ⁰_l, from γ_l = ‖Δ_l‖:   10 times   g = (L₊ − L₋) / 2ε_p,
    γ_l ← γ_l − s ‖Δ_l‖ g z_l within (1 ± τ) ‖Δ_l‖,   L_± at θ_l = θ⁰_l + (γ_l ± ε_p z_l) Δ_l / ‖Δ_l‖;   then θ_l ← θ⁰_l + γ_l Δ_l / ‖Δ_l‖

    z_l ~ N(0, 1), within ±τ ‖Δ_l‖ / ε_p. κ = ``interval``, 10 ``iterations``, ε_p = ``projection_eps``, s = ``projection_lr``, τ =
    ``clip``. Projected are the matrices that make keys and values, also where queries come from the same matrix; all matrices where no
    name is one of those, or with ``projected="matrices"``. Beside its two forward passes a step has 20 / κ on average. State: θ⁰ of the
    projected matrices.
    Departs from the paper and its code in the data of a search, which is the batch of the step after it, not ten batches; embeddings are
    trained here; and weights are computed from θ⁰ and Δ_l each time, where the code divides the rounded weights. As in the code s z_l
    multiplies ‖Δ_l‖, although z_l is a length itself. A run's last step is not followed by a search.
    """
    return {"projection": LayerProjection(interval, iterations, projection_eps, projection_lr, clip, projected)}
