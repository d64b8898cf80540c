"""Sparse methods: of every matrix only some numbers move."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.subspaces import Sensitive, Sparse


@register
def zo_sparse(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    density: float = 0.8,
    layers: str = "uniform",
    interval: int = 100,
) -> Method:
    """ZO-SGD with gradient sparsity: a random part of every matrix moves, drawn anew every ``interval`` steps (2402.11592).

    c = (L(θ + ε m⊙Z) − L(θ − ε m⊙Z)) / 2ε,   θ ← θ − η c m⊙Z,   m ∈ {0, 1}, P(m_i = 1) = density of i's matrix

    ``layers="uniform"``: every matrix has the same density; ``"magnitude"``: of the density of all matrices together each has its share
    of the largest magnitudes at the start. Vectors (bias, norm) move whole. State: none in float32; masks follow from keys.
    """
    return Method(
        name="zo-sparse",
        title="ZO-SGD, random sparsity",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Sparse(density, "magnitude" if layers == "magnitude" else _uniform(layers), interval),
        estimates="descent",
    )


@register
def sparse_mezo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    density: float = 0.25,
) -> Method:
    """Sparse MeZO: the small weights of every matrix move, the large ones rest (2402.15751).

    m = [|W| ≤ τ],   c = (L(W + ε m⊙Z) − L(W − ε m⊙Z)) / 2ε,   W ← W − η c m⊙Z

    τ of a matrix is the magnitude that a fraction ``density`` of its weights does not exceed at the start (to within 0.4%); m is that of
    the weights as they are, made again wherever it is needed and never stored. Vectors (bias, norm) move whole.
    State: τ, a number a matrix.
    """
    return Method(
        name="sparse-mezo",
        title="Sparse MeZO",
        arxiv="2402.15751",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Sparse(density, "small"),
        estimates="descent",
        reach="part",
    )


@register
def sensitive_mezo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    density: float = 1e-3,
    mask_directions: int = 0,
) -> Method:
    """SensZOQ's sparse training: the few weights of every matrix to which the loss is most sensitive move (2406.02913).

    c = (L(θ + ε m⊙Z) − L(θ − ε m⊙Z)) / 2ε,   θ ← θ − η c m⊙Z,   m = the largest Σ_b (∂ℓ_b/∂W_i)² of every matrix

    The squared gradients are of the first step's batch, by one backward pass for each of its examples, with the memory of training by
    backpropagation that once; m stays for the run. Vectors (bias, norm) move whole. State: an int32 index for every weight that moves.
    With ``mask_directions`` K above 0 no backward pass is made: they are estimated along K random directions, by 2K forwards, which finds
    the weights whose share of the squared gradient is above 1/K or so, and takes others by chance.
    Departs from the paper, which takes the gradients on general text, and keeps the weights that rest in 4 bits: here they stay as
    they are. The indices go to the journal.
    """
    return Method(
        name="sensitive-mezo",
        title="Sensitive MeZO",
        arxiv="2406.02913",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Sensitive(density, mask_directions),
        estimates="descent",
        reach="part",
    )


def _uniform(layers: str) -> str:
    if layers != "uniform":
        raise ValueError(f"layers must be 'uniform' or 'magnitude', not {layers!r}.")
    return layers
