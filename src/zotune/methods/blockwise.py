"""Block-wise methods: one block of a model at a time is perturbed, so that others add no noise to its loss difference."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.subspaces import Blocks


@register
def zo_block(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    unit: str = "layer",
) -> Method:
    """Block-wise ZO-SGD, Gauss–Seidel: in step t block t mod B moves, the others as they have become (2402.11592).

    c = (L(θ + εZ_b) − L(θ − εZ_b)) / 2ε,   θ_b ← θ_b − η c Z_b,   b = t mod B,   Z_b 0 outside block b

    A block is a layer of the model (``unit="layer"``: those that its longest list of like modules repeats; embeddings, head and whatever
    else lies outside make one more), or a module with weights of its own (``unit="linear"``). State: none in float32.
    A round of B steps takes the evaluations of B steps of MeZO, each on a batch of its own.
    Departs from the published code, in which all blocks draw from the same seed, so that their directions are equal.
    """
    return Method(
        name="zo-block",
        title="ZO-SGD by blocks",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Blocks(unit, "gauss-seidel"),
        estimates="direction",
    )


@register
def zo_block_jacobi(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    unit: str = "layer",
) -> Method:
    """Block-wise ZO-SGD, Jacobi: every block has a loss difference of its own, then all move together (2402.11592).

    c_b = (L(θ + εZ_b) − L(θ − εZ_b)) / 2ε for every block b,   θ ← θ − η Σ_b c_b Z_b,   Z_b 0 outside block b

    Blocks as in ``zo-block``. A step of B blocks takes 2B evaluations (times ``num_directions``), and its estimate has the noise of one
    block in each. State: none in float32.
    """
    return Method(
        name="zo-block-jacobi",
        title="ZO-SGD by blocks, Jacobi",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Blocks(unit, "jacobi"),
    )
