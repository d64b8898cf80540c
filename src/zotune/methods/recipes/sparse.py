"""Sparse methods: only some elements of every matrix are trained."""

from __future__ import annotations

from zotune.methods.registry import PER, Fields, register
from zotune.subspaces import Sensitive, Sparse


@register(title="ZO-SGD, random sparsity", arxiv="2402.11592")
def zo_sparse(*, density: float = 0.8, layers: str = "uniform", interval: int = 100) -> Fields:
    """ZO-SGD with gradient sparsity: a random part of every matrix is trained, drawn anew every ``interval`` steps (2402.11592).

    c = (L(θ + ε m⊙Z) − L(θ − ε m⊙Z)) / 2ε,   θ ← θ − η c m⊙Z,   m ∈ {0, 1}, P(m_i = 1) = density of i's matrix

    ``layers="uniform"``: every matrix has the same density. ``"magnitude"``: the densities follow the share of each matrix in the largest
    magnitudes of all matrices at the start. Vectors (bias, norm) are trained whole. State: none; masks follow from keys.
    """
    if layers not in ("uniform", "magnitude"):
        raise ValueError(f"layers must be 'uniform' or 'magnitude', not {layers!r}.")
    return {"subspace": Sparse(density, layers, interval), "estimates": "descent"}


@register(title="Sparse MeZO", arxiv="2402.15751")
def sparse_mezo(*, density: float = 0.25) -> Fields:
    """Sparse MeZO: the small weights of every matrix are trained, the large ones are not (2402.15751).

    m = [|W| ≤ τ],   c = (L(W + ε m⊙Z) − L(W − ε m⊙Z)) / 2ε,   W ← W − η c m⊙Z

    τ of a matrix is the magnitude that a fraction ``density`` of its weights does not exceed at the start (to within 0.4%). m follows the
    current weights: it is computed wherever it is needed and never stored. Vectors (bias, norm) are trained whole.
    State: τ, one element per matrix.
    """
    return {"subspace": Sparse(density, "small"), "estimates": "descent", "reach": "part"}


@register(title="Sensitive MeZO", arxiv="2406.02913", without=(*PER, "rounding"))
def sensitive_mezo(*, density: float = 1e-3, mask_directions: int = 0) -> Fields:
    """SensZOQ's sparse training: only the weights of every matrix to which the loss is most sensitive are trained (2406.02913).

    c = (L(θ + ε m⊙Z) − L(θ − ε m⊙Z)) / 2ε,   θ ← θ − η c m⊙Z,   m = the largest Σ_b (∂ℓ_b/∂W_i)² of every matrix

    The squared gradients are of the first step's batch, by one backward pass for each of its examples, with the memory of training by
    backpropagation that once; m is fixed for the run. Vectors (bias, norm) are trained whole. State: an int32 index per trained weight.
    With ``mask_directions`` K above 0 no backward pass is made: squared gradients are estimated along K random directions, by 2K
    forwards. This finds the weights whose share of the squared gradient is above about 1/K, and chooses others by chance.
    Departs from the paper, which takes the gradients on general text, and stores untrained weights in 4 bits: here they are not changed.
    The indices go to the journal.
    """
    return {"subspace": Sensitive(density, mask_directions), "estimates": "descent", "reach": "part"}
