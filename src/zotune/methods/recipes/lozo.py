"""LOZO and its family: matrices are trained in a low-rank subspace that is redrawn from time to time."""

from __future__ import annotations

from zotune.methods.registry import Fields, register
from zotune.subspaces import Activation, Guided, InitialActivation, LowRank


@register(title="LOZO", arxiv="2410.07698", any_rule=True)
def lozo(*, rank: int = 2, interval: int = 50) -> Fields:
    """LOZO: SGD in a low-rank subspace that is redrawn every ``interval`` steps (2410.07698).

    c = (L(W + ε U Vᵀ) − L(W − ε U Vᵀ)) / 2ε,   W ← W − η c U Vᵀ / r,   U (m, r), V (n, r) ~ N(0, 1), V kept for ν steps

    Vectors (bias, norm) as in MeZO. State: A and V, r·(m + n) float32 elements per matrix.
    Departs from the published code, which updates along a U that it did not perturb on every redraw step, and leaves out the 1/r.
    """
    return {"subspace": LowRank(rank, interval)}


@register(title="LOZO-M", arxiv="2410.07698")
def lozo_m(*, rank: int = 2, interval: int = 50, momentum: float = 0.9) -> Fields:
    """LOZO-M: LOZO with an exponential moving average of c U in place of c U (2410.07698).

    N ← β N + (1 − β) c U,   W ← W − η N Vᵀ / r,   at a redraw   N ← N V_oldᵀ V_new / n

    State: LOZO's and N, another r·m elements per matrix: momentum at almost no cost.
    """
    return {"subspace": LowRank(rank, interval), "update_rule": "EMASGD", "update_rule_args": {"beta": momentum}, "update_rule_state": 1}


@register(title="LOZO-E", arxiv="2410.07698", any_rule=True, num_directions=3, directions_per="example", estimator="forward")
def lozo_e(*, rank: int = 1, interval: int = 50, layer_scales: bool = True) -> Fields:
    """LOZO-E: LOZO with directions per example and a scale per layer, zotune's own choice (LOZO 2410.07698; GRZO 2606.02857).

    c_bk = (ℓ_b(W + ε σ U_bk Vᵀ) − ℓ_b(W)) / ε,   W ← W − η (1/3B) Σ_b Σ_k c_bk σ U_bk Vᵀ / r,   k = 1, 2, 3

    Each example b of the batch is evaluated at W and under three directions of its own. The noise of the directions, ‖∇ℓ_b‖² times the
    number of dimensions, is averaged over 3B of them, for four evaluations in place of two. σ is measured for each layer, so that all
    coordinates have the same share in the loss difference (see ``layer_scales``). In a trainer that knows the examples' classes, groups
    of one example per class take the place of single examples: the largest differences between their gradients cancel in a group.
    State: LOZO's, r·(m + n) float32 elements per matrix.
    """
    return {"subspace": LowRank(rank, interval, layer_scales)}


@register(title="LOZO-G", arxiv="1609.01596", any_rule=True, num_directions=3, directions_per="example", estimator="forward")
def lozo_g(
    *,
    rank: int = 1,
    interval: int = 30,
    layer_scales: bool = True,
    guide: int = 8,
    begin: int = 0,
    examples: int = 128,
    momentum: float = 0.9,
) -> Fields:
    """LOZO-G: feedback alignment for the layers that write to the hidden state, with phases of LOZO-E; zotune's own (1609.01596).

    Ĝ = (1/B) Σ_i (Pᵀδ_i)(Vᵀx_i)ᵀ,   δ_i = W_headᵀ (softmax(z_i) − e_{y_i})
    M ← β M + (1 − β) Ĝ,   W ← W − η P polar(M) Vᵀ,   polar(U Σ Wᵀ) = U Wᵀ

    A step of a guided phase is one forward pass of the batch without perturbation. It gives δ, the gradient in the head's input, in closed
    form, and behind the final norm the gradient in the hidden state that layers add to (``objectives.final_norm``). A layer that adds W x
    to that state takes δ xᵀ as its gradient, as if nothing stood between (direct feedback alignment, 1609.01596, with the head's own
    weights as feedback), in the subspace of x that predicts δ best by ridge regression. The regression takes ``examples`` training
    examples, from the trainer or from the optimizer's ``sample_batches``; P and V are renewed every ν steps. Sizes within Ĝ, which feedback
    knows least of, do not matter (polar, as in Muon, 2502.16982). A measured η comes from the slope and curvature of the loss along the
    step, by a few evaluations. An update rule other than plain SGD is given α Ĝ instead, α the measured slope over the one of Ĝ. See
    ``subspaces.guided``.
    All other weights are trained in phases of LOZO-E. These come seldom, and always where the loss gives no output gradients: it gives
    them for language-model losses, answer options of one token, and classifiers. P and V go to the journal in eight bits, q·(m + n) bytes
    per guided layer and phase, and q² coefficients per layer and step, so that a run replays without the data.
    State: A, and V and P of a guided layer, r·m + q·(m + n) float32 elements per matrix; M, q² numbers.
    """
    return {"subspace": Guided(rank, interval, layer_scales, guide, begin, examples, momentum), "estimates": "descent"}


@register(title="AGZO", arxiv="2601.17261", any_rule=True)
def agzo(*, rank: int = 1, interval: int = 50) -> Fields:
    """AGZO: LOZO with V from each layer's inputs instead of a Gaussian one (2601.17261).

    c = (L(W + ε U Vᵀ) − L(W − ε U Vᵀ)) / 2ε,   W ← W − η c U Vᵀ / r,   V (n, r) = √n · the leading right singular vectors of x (rows, n)

    At a redraw one more forward of the step's batch gives V of every Linear layer by power iteration; layers of other kinds have LOZO's
    V. √n gives V the size of LOZO's. The gradient's rows lie in the span of the inputs, so little of the gradient lies outside V
    where x has few large singular values; that part is not trained until V changes.
    V goes to the journal in bfloat16, 2·n·r bytes per layer and redraw, so that a run replays without the data.
    State: A and V, r·(m + n) float32 elements per matrix.
    Departs from the paper, whose ĝ = (L(W + μ R Qᵀ) − L(W)) / μ · R Qᵀ, Q = V / √n orthonormal, is one-sided, without the 1/r, and has
    Q renewed for every batch. ``interval=1, estimator="forward"`` is its schedule and its difference. Its scale is another one: with
    ε = μ / √n the points are the same, and its update is r / n of that with the same η, by layer; of vectors ε is μ, as in MeZO.
    """
    return {"subspace": Activation(rank, interval), "estimates": "descent"}


@register(title="ZO-Act", arxiv="2607.01125", lr=1e-5, estimator="forward")
def zo_act(*, rank: int = 8, betas: tuple[float, float] = (0.9, 0.999)) -> Fields:
    """ZO-Act: Adam in the span of each layer's inputs as they are when training begins (2607.01125).

    c_k = (L(C + ε Z_k) − L(C)) / ε,   C ← Adam(C, (1/K) Σ c_k Z_k),   W + C Vᵀ,   Z_k, C (m, r),   C = 0 at first

    V (n, r): the leading right singular vectors of the layer's inputs in the first step's batch, for the whole run; only that span of a
    matrix is trained. V goes to the journal in bfloat16, 2·n·r bytes per layer, so that a run replays without the data.
    State: C, V and two moments of C, r·(3m + n) float32 elements per matrix; two elements per weight of vectors.
    Departs from the paper, which trains no vectors (bias, norm), embeddings and heads: here vectors are trained in full space, and layers
    that are not Linear in a random subspace with orthonormal V; set ``requires_grad = False`` to keep them.
    No code is published. The paper's r, η, ε, Adam's β, the number of directions and of examples behind V, and a scale of V could not be
    verified, and accounts of it differ in whether differences are one-sided; the defaults are zotune's.
    """
    return {
        "subspace": InitialActivation(rank),
        "update_rule": "Adam",
        "update_rule_args": {"betas": tuple(betas)},
        "update_rule_state": 2,
        "estimates": "descent",
        "reach": "span",
    }
