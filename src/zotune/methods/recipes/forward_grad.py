"""Forward-Grad: the directional derivative itself, by forward-mode differentiation."""

from __future__ import annotations

from zotune.methods.registry import PER, Fields, register


@register(title="Forward-Grad", arxiv="2402.11592", without=(*PER, "estimator", "fitness"))
def forward_grad() -> Fields:
    """Forward-Grad: SGD on exact directional derivatives, by forward-mode differentiation (2202.08587, 2402.11592).

    c = ∇L(θ) · Z,   θ ← θ − η c Z,   Z ~ N(0, I)

    One evaluation per direction, in which every activation carries its derivative along: about the work of two forwards, and no error in
    ε (``eps`` is used only to measure a learning rate). The loss must be differentiable and returned undetached.
    State: none; during an evaluation the tangent of one module's weights, where published code holds the whole model's.
    Attention kernels without a forward derivative are replaced by plain products, with one warning.
    """
    return {"estimator": "tangent"}
