"""Forward-Grad: the directional derivative itself, by forward-mode differentiation."""

from __future__ import annotations

from zotune.methods.method import Method
from zotune.methods.registry import register


@register
def forward_grad(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int = 1,
    direction: str = "gaussian",
) -> Method:
    """Forward-Grad: SGD on exact directional derivatives, by forward-mode differentiation (2202.08587, 2402.11592).

    c = ∇L(θ) · Z,   θ ← θ − η c Z,   Z ~ N(0, I)

    One evaluation a direction, in which every number carries its derivative along: about the work of two forwards, and no error in ε
    (``eps`` is what a measured learning rate is measured with). The loss has to be differentiable, and to be returned undetached.
    State: none in float32; during an evaluation the tangent of one module's weights, where published code holds the whole model's.
    Attention kernels without a forward derivative are replaced by plain products, which a warning says once.
    """
    return Method(
        name="forward-grad",
        title="Forward-Grad",
        arxiv="2402.11592",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator="tangent",
    )
