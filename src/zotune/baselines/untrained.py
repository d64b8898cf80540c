"""The baselines without gradient steps: the model as it is, with demonstrations in its prompt, or with a linear probe."""

from __future__ import annotations

from zotune.baselines.baseline import Baseline
from zotune.baselines.registry import register


@register
def zero_shot() -> Baseline:
    """The untrained model, as ``zotune eval`` evaluates it.

    State: none; no step is taken.
    """
    return Baseline("zero-shot", "zero-shot", "", kind="evaluate")


@register
def icl() -> Baseline:
    """In-context learning: the untrained model with k solved training examples before every prompt (2005.14165).

    ``--num_demonstrations k`` (32 when not given) rows are drawn by ``--seed`` and stand before every prompt in the same order, each with
    its answer, a blank line after each. With ``--demonstrations_per example`` others are drawn for each prompt (2305.17333). State: none;
    no step is taken.
    """
    return Baseline("icl", "in-context learning", "2005.14165", kind="evaluate")


@register
def linear_probe(*, l2: float = 1e-3, folds: int = 0) -> Baseline:
    """A linear probe: logistic regression on the frozen model's last hidden state at the end of the prompt (1610.01644).

    min over A, b of  (1/N) Σ −log softmax(A h_i + b)[y_i] + λ ‖A‖² / 2,   h standardized by the training examples, by L-BFGS

    One forward pass of every training example and no step of the model. State: h, one vector an example.
    With ``folds`` the probe is that of MeZO's code (2305.17333), scikit-learn's LogisticRegressionCV without an intercept: h as it is,
    b = 0, and λ = 1 / (C N) with the C of 10^-4 ... 10^4 (ten, evenly by exponent) of the best mean accuracy on held-out folds.
    """
    if l2 < 0:
        raise ValueError(f"linear-probe: l2 must be at least 0, got {l2}.")
    if folds < 0 or folds == 1:
        raise ValueError(f"linear-probe: folds must be 0 (none) or at least 2, got {folds}.")
    return Baseline("linear-probe", "linear probe", "1610.01644", kind="fit", memory="a vector an example")
