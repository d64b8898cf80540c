"""Block-wise methods: one block of a model at a time is perturbed, so that others add no noise to its loss difference."""

from __future__ import annotations

from zotune.methods.registry import PER, Fields, register
from zotune.subspaces import Blocks


@register(title="ZO-SGD by blocks", arxiv="2402.11592")
def zo_block(*, unit: str = "layer") -> Fields:
    """Block-wise ZO-SGD, Gauss–Seidel: step t trains block t mod B, after the updates of the others (2402.11592).

    c = (L(θ + εZ_b) − L(θ − εZ_b)) / 2ε,   θ_b ← θ_b − η c Z_b,   b = t mod B,   Z_b 0 outside block b

    With ``unit="layer"`` a block is one of the model's repeated layers; embeddings, head and everything else outside them are one more
    block. With ``unit="linear"`` it is a module with weights of its own. State: none.
    A round of B steps takes the evaluations of B steps of MeZO, each on a batch of its own.
    Departs from the published code, in which all blocks draw from the same seed, so that their directions are equal.
    """
    return {"subspace": Blocks(unit, "gauss-seidel"), "estimates": "direction"}


@register(title="ZO-SGD by blocks, Jacobi", arxiv="2402.11592", without=PER)
def zo_block_jacobi(*, unit: str = "layer") -> Fields:
    """Block-wise ZO-SGD, Jacobi: every block has a loss difference of its own, then all are updated at once (2402.11592).

    c_b = (L(θ + εZ_b) − L(θ − εZ_b)) / 2ε for every block b,   θ ← θ − η Σ_b c_b Z_b,   Z_b 0 outside block b

    Blocks as in ``zo-block``. A step of B blocks takes 2B evaluations (times ``num_directions``), and its estimate has the noise of one
    block in each. State: none.
    """
    return {"subspace": Blocks(unit, "jacobi")}
