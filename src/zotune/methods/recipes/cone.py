"""ConMeZO: directions in a cone around a momentum."""

from __future__ import annotations

from zotune.methods.registry import Fields, register
from zotune.subspaces import Cone


@register(title="ConMeZO", arxiv="2511.02757")
def conmezo(*, angle: float = 1.35, beta: float = 0.95, warm_up: int = 2000) -> Fields:
    """ConMeZO: directions are drawn in a cone around the momentum of past estimates (2511.02757).

    Z = cos φ √d m / ‖m‖ + sin φ u,   c = (L(θ + εZ) − L(θ − εZ)) / 2ε,   θ ← θ − η c Z,   m ← β m + (1 − β) c Z,   u ~ N(0, I)

    m, of all d trained weights together, begins at 0, and as long as it is 0 Z is u. φ = ``angle``, π/2 is MeZO. E‖Z‖² = d as in MeZO, so
    η and ε compare with MeZO's directly. Over ``warm_up`` steps β rises from 0.1, where it stays for the first tenth, as in the published
    code. Of several directions each has a u of its own, and m takes in the mean of c_k Z_k; the paper has one. State: m, one float32
    element per weight.
    Departs from the published code for language models, where m begins as a random vector, ‖m‖ is a model of its size, and m is stored
    in the weights' precision; the equations are those of its synthetic experiments.
    """
    return {"subspace": Cone(angle, beta, warm_up), "estimates": "descent"}
