"""LOZO and its family: matrices move in a low-rank subspace that is redrawn now and then."""

from __future__ import annotations

from typing import Any

from zotune.methods.method import Method
from zotune.methods.registry import register
from zotune.subspaces import Guided, Inputs, LowRank


@register
def lozo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    rank: int = 2,
    interval: int = 50,
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """LOZO: SGD in a low-rank subspace that is redrawn every ``interval`` steps (2410.07698).

    c = (L(W + ε U Vᵀ) − L(W − ε U Vᵀ)) / 2ε,   W ← W − η c U Vᵀ / r,   U (m, r), V (n, r) ~ N(0, 1), V kept for ν steps

    Matrices move so; vectors (bias, norm) as in MeZO. State: A and V, r·(m + n) float32 numbers a matrix.
    Departs from the published code, which updates along a U that it did not perturb on every redraw step, and leaves out the 1/r.
    """
    return Method(
        name="lozo",
        title="LOZO",
        arxiv="2410.07698",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=LowRank(rank, interval),
        rule=rule,
        rule_args=rule_args or {},
    )


@register
def lozo_m(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    rank: int = 2,
    interval: int = 50,
    momentum: float = 0.9,
) -> Method:
    """LOZO-M: LOZO with an exponential moving average of c U in place of c U (2410.07698).

    N ← β N + (1 − β) c U,   W ← W − η N Vᵀ / r,   at a redraw   N ← N V_oldᵀ V_new / n

    State: LOZO's and N, another r·m numbers a matrix: momentum all but free.
    """
    return Method(
        name="lozo-m",
        title="LOZO-M",
        arxiv="2410.07698",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=LowRank(rank, interval),
        rule="EMASGD",
        rule_args={"beta": momentum},
        rule_state=1,
    )


@register
def lozo_e(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = "example:3",
    direction: str = "gaussian",
    estimator: str = "forward",
    rank: int = 1,
    interval: int = 50,
    layer_scales: bool = True,
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """LOZO-E: LOZO with directions per example and a scale per layer, zotune's own choice (LOZO 2410.07698; GRZO 2606.02857).

    c_bk = (ℓ_b(W + ε σ U_bk Vᵀ) − ℓ_b(W)) / ε,   W ← W − η (1/3B) Σ_b Σ_k c_bk σ U_bk Vᵀ / r,   k = 1, 2, 3

    Each example b of the batch is evaluated at W and under three directions of its own. The noise of the directions, ‖∇ℓ_b‖² times the
    number of dimensions, is averaged over 3B of them, for four evaluations in place of two. σ is measured for each layer, so that all
    coordinates have the same share in the loss difference (see ``layer_scales``). In a trainer that knows the examples' classes, sets of
    neighbours of different classes take the place of single examples: what their gradients differ by most cancels in them.
    State: LOZO's, r·(m + n) float32 numbers a matrix.
    """
    return Method(
        name="lozo-e",
        title="LOZO-E",
        arxiv="2410.07698",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=LowRank(rank, interval, layer_scales),
        rule=rule,
        rule_args=rule_args or {},
    )


@register
def lozo_g(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = "example:3",
    direction: str = "gaussian",
    estimator: str = "forward",
    rank: int = 1,
    interval: int = 30,
    layer_scales: bool = True,
    guide: int = 8,
    begin: int = 0,
    examples: int = 128,
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """LOZO-G: output errors guide the layers that write to the hidden state, and LOZO-E has a turn now and then; zotune's own (1609.01596).

    W ← W − η P Ĝ Vᵀ,   Ĝ = α (1/B) Σ_i (Pᵀδ_i)(Vᵀx_i)ᵀ,   δ_i = W_headᵀ (softmax(z_i) − e_{y_i})

    A step of a guided turn is one forward pass of the batch, nothing perturbed. It tells δ, the gradient in the last hidden state, in
    closed form; a layer that adds W x to that state is given δ xᵀ as its gradient, as if nothing stood between, in the subspace of what x
    can tell of δ by ridge regression on ``examples`` of the training data, of which a trainer, or who gives the optimizer ``examples``,
    has enough; P and V are renewed every ν steps. α is the slope that two more evaluations find along Ĝ, by what was told. The idea is
    direct feedback (1609.01596), with the head's own weights for the feedback. See ``subspaces.guided`` and ``guidance``.
    All other weights move in LOZO-E's turns, which come seldom, and always where the loss tells no errors: it tells them for language-model
    losses, and for answer options of one token. P and V go to the journal in bfloat16, 2·q·(m + n) bytes a guided layer and turn, and q²
    numbers a layer and step, so that a run replays without the data.
    State: A, and V and P of a guided layer, r·m + q·(m + n) float32 numbers a matrix.
    """
    return Method(
        name="lozo-g",
        title="LOZO-G",
        arxiv="1609.01596",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Guided(rank, interval, layer_scales, guide, begin, examples),
        rule=rule,
        rule_args=rule_args or {},
        estimates="descent",
    )


@register
def agzo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    rank: int = 1,
    interval: int = 50,
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """AGZO: LOZO with V from each layer's inputs instead of a Gaussian one (2601.17261).

    c = (L(W + ε U Vᵀ) − L(W − ε U Vᵀ)) / 2ε,   W ← W − η c U Vᵀ / r,   V (n, r) = √n · the leading right singular vectors of x (rows, n)

    At a redraw one more forward of the step's batch gives V of every Linear layer by power iteration; layers of other kinds have LOZO's
    V. √n gives V the size of LOZO's. Since the gradient's rows lie in the span of the inputs, little of it lies outside V
    where x has few large singular values; that part is out of reach until V changes.
    V goes to the journal in bfloat16, 2·n·r bytes a layer and redraw, so that a run replays without the data.
    State: A and V, r·(m + n) float32 numbers a matrix.
    """
    return Method(
        name="agzo",
        title="AGZO",
        arxiv="2601.17261",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        subspace=Inputs(rank, interval),
        rule=rule,
        rule_args=rule_args or {},
        estimates="descent",
    )
