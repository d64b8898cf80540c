"""PseuZO: the output gradient with a Jacobian that past directions estimate."""

from __future__ import annotations

from zotune.methods.output_window import OutputWindow
from zotune.methods.registry import PER, Fields, register


@register(title="PseuZO", arxiv="tM4cHBD7kD", without=(*PER, "estimator", "fitness"), lr=1e-7)
def pseuzo(*, window: int = 14, epoch: int = 63, cycle: int = 5000) -> Fields:
    """PseuZO: the gradient in the model's output, exact, with a Jacobian that a window of past directions estimates (tM4cHBD7kD).

    Δ_t = o(θ + εZ_t) − o(θ),   c_j = λ^(t−j) ⟨Δ_j, δ_t⟩ / ε,   θ ← θ − η Σ_j c_j Z_j,   j = t − w + 1, ..., t,   δ = ∂L/∂o at θ

    o: the last hidden states at the scored positions, δ in closed form, as in ``lozo-g``. Two forward passes per step, in turn. λ is
    1 / (1 + 10 e) in the ``epoch`` number e of a cycle and 0 after e = 10, where a step is a forward difference; every ``cycle`` the window
    begins anew. 63 steps are an epoch of 1,000 examples, 5,000 half of the published run. State: w − 1 = 13 means of Δ, of as many elements
    as the head's input has, and the coefficients of a step; the journal has one such mean per step. These are bfloat16 numbers.
    After the published code (NeurIPS 2025, OpenReview), since the paper's algorithm could not be read. Departs from it for j < t: the code
    multiplies Δ_j of a row of an old batch by δ_t of the same row of the present one, another example; here the mean of Δ_j is multiplied
    by that of δ_t, which has the same expectation and no such noise. Where λ is 0 the code takes central differences.
    Since o is before the head, what Z does to the head's weights is not in its slope: a head of its own is trained by the difference of the
    losses, and one that is the embedding too only as such, as in the code.
    Without output gradients (a custom loss, a reward, a model without a known head) every step is a forward difference.
    """
    return {"estimator": "forward", "history": OutputWindow(window, epoch, cycle), "estimates": "descent"}
