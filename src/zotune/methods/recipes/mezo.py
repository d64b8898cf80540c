"""MeZO and its family: plain torch rules on the estimate in full space."""

from __future__ import annotations

from zotune.methods.kernel import Kernel
from zotune.methods.registry import PER, Fields, register
from zotune.methods.selection import Selection


@register(title="MeZO", arxiv="2305.17333", any_rule=True)
def mezo() -> Fields:
    """MeZO, or ZO-SGD: plain SGD on the n-SPSA estimate, in full space (2305.17333).

    c = (L(θ + εZ) − L(θ − εZ)) / 2ε,   θ ← θ − η c Z,   Z ~ N(0, I)

    State: none. Half-precision weights are rounded stochastically, so that updates far below their spacing add up on average; with
    ``rounding="residual"`` they add up exactly, at 2 bytes a weight.
    Departs from the published code: no weight is written to evaluate, the global generator is not reseeded, every parameter draws from
    its own key, gradient accumulation works, and the seeds and coefficients are on file (the journal).
    With ``update_rule`` any torch optimizer takes the place of SGD.
    """
    return {}


@register(title="MeZO-momentum", arxiv="2305.17333")
def mezo_momentum(*, momentum: float = 0.9) -> Fields:
    """MeZO with heavy-ball momentum, or ZO-SGD-MMT (2305.17333, 2402.11592).

    m ← β m + ĝ,   θ ← θ − η m,   β = 0.9

    State: m, one float32 element per weight.
    """
    return {"update_rule_args": {"momentum": momentum}, "update_rule_state": 1}


@register(title="MeZO-Adam", arxiv="2305.17333", lr=1e-5)
def mezo_adam(update_rule: str = "Adam", *, betas: tuple[float, float] = (0.9, 0.999)) -> Fields:
    """MeZO with Adam, or ZO-Adam (2305.17333).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) ĝ²,   θ ← θ − η m̂ / (√v̂ + 1e-8)

    State: m and v, two float32 elements per weight.
    """
    return {"update_rule": update_rule, "update_rule_args": {"betas": tuple(betas)}, "update_rule_state": 2}


@register(title="KerZOO", arxiv="2505.18886", without=(*PER, "estimator", "fitness"))
def kerzoo(*, kernel: str = "cubic") -> Fields:
    """KerZOO: differences over random lengths, weighted by a kernel that cancels their leading error (2505.18886).

    c_k = K(r_k) (L(θ + ε r_k Z_k) − L(θ − ε r_k Z_k)) / 2ε,   θ ← θ − η (1/K) Σ c_k Z_k,   r_k ~ U[−1, 1],   K(r) = (15/4) r (5 − 7r²)

    E[r K(r)] = 1 and E[r³ K(r)] = 0: the estimate is the gradient's without MeZO's error in ε², which is small at ε = 1e-3. In return its
    second moment is E[r² K²] = 6.25 times MeZO's, so that the best η is up to 6.25 times smaller. ``kernel="linear"``, K(r) = 3 r, keeps
    3/5 of that error at 1.8 times the second moment. State: none.
    The paper's constant C is 1 here; another one is a factor of η. No code is published, and the paper's η, ε and number of directions
    could not be verified: the defaults are MeZO's. Its third kernel is left out, since in the form found its mean is 13/7 of the gradient.
    """
    return {"kernel": Kernel(kernel)}


@register(title="MeZO-Greedy", arxiv="2601.04710", without=(*PER, "estimator", "fitness"), num_directions=2)
def mezo_greedy() -> Fields:
    """MeZO-Greedy: of several directions the one whose point has the lowest loss (2601.04710).

    c = (L(θ + εZ*) − L(θ − εZ*)) / 2ε,   θ ← θ − η c Z*,   Z* = Z_k of the lowest L(θ + εZ_k),   k = 1 … M

    M = ``num_directions``; M + 2 evaluations, all on the step's batch. State: none.
    On a linear loss the mean of c Z* is E[x²] ∇, x the least of M standard normal numbers: ∇ itself for M = 2, 1.6 ∇ for M = 4, and at the
    best η a step lowers the loss by that factor over MeZO's, of 2 evaluations. What the choice gains beyond is due to curvature.
    """
    return {"estimator": "leave-one-out", "selection": Selection(), "estimates": "direction"}


@register(title="MeZO-GV", arxiv="2601.04710", without=(*PER, "estimator", "fitness"), num_directions=4)
def mezo_gv(*, share: float = 0.5) -> Fields:
    """MeZO-GV: along a guiding vector, the mean of the better directions less that of the worse (2601.04710).

    v = mean of Z_k over the s lowest L(θ + εZ_k) − mean over the others,   s = ⌊αM⌋,   k = 1 … M

    c = (L(θ + εv) − L(θ − εv)) / 2ε,   θ ← θ − η c v

    M = ``num_directions``, α = ``share``; M + 2 evaluations, all on the step's batch. State: none.
    E‖v‖² is (1/s + 1/(M − s)) times MeZO's, 1 at the defaults. With M = 2 v is ± (Z₁ − Z₂), and the sign of v cancels in c v: the choice
    changes nothing, and this is MeZO with √2 ε and 2 η at 4 evaluations. On a linear loss the mean of c v is a multiple of ∇, and at the
    best η a step of M = 4 lowers the loss 2.1 times as much as one of MeZO, of 2 evaluations.
    Departs from the published code, which compares one new direction a step with the best of the steps before, and stores v.
    """
    return {"estimator": "leave-one-out", "selection": Selection(share), "estimates": "direction"}
