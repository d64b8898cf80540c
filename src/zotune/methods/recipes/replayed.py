"""MeZO with momentum and with Adam, the moments computed from the history of coefficients instead of stored."""

from __future__ import annotations

from zotune.methods.history import HistoryAdam, HistoryMomentum
from zotune.methods.registry import Fields, register


@register(title="MeZO-momentum, replayed", arxiv="2305.17333")
def replayed_momentum(*, momentum: float = 0.9, history: int = 10) -> Fields:
    """MeZO-momentum without its memory (2305.17333, appendix B.2).

    θ ← θ − η Σ_j β^(t−j) ĝ_j,   j = t − h + 1, ..., t

    ĝ_j is drawn again from the key of step j. State: h·K coefficients. An update draws h directions instead of one.
    """
    return {"history": HistoryMomentum(history, momentum)}


@register(title="AdaMeZO", arxiv="2605.00650", lr=1e-5)
def replayed_adam(*, betas: tuple[float, float] = (0.7, 0.9), history: int = 10, bias_correction: bool = True) -> Fields:
    """Adam without its memory: AdaMeZO (2605.00650; 2305.17333, appendix B.2).

    m = (1 − β₁) Σ_j β₁^(t−j) ĝ_j,   v = (1 − β₂) Σ_j β₂^(t−j) ĝ_j²,   θ ← θ − η m̂ / (√v̂ + 1e-8),   j = t − h + 1, ..., t

    The bias corrections count the steps in the sums, at most h: this is Adam started afresh h steps ago. State: h·K coefficients. An
    update draws h directions instead of one, and holds m, v and ĝ_j of one parameter at a time.
    Departs from AdaMeZO, which corrects nothing and has the constant within the root; ``bias_correction=False`` is its θ ← θ − η m /
    √(v + 1e-8). With h = 10 and these betas the corrected step is 0.83 of that. The published code takes 100 Σ β₁^(t−j) ĝ_j /
    (√(Σ β₂^(t−j) ĝ_j²) + 1e-5), which is 105 times the paper's step, and steps of MeZO until the history is full.
    """
    return {"history": HistoryAdam(history, (betas[0], betas[1]), corrected=bias_correction)}
