"""First- and second-order baselines: recipes with their papers' equations and defaults."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zotune.baselines.baseline import Baseline, Setting
from zotune.baselines.galore import galore_optimizer
from zotune.baselines.mkor import MKOR, preconditioned
from zotune.baselines.registry import register
from zotune.baselines.scale import SCALE
from zotune.baselines.split_check import refusal as split_refusal

Shapes = Mapping[str, tuple[int, ...]]
_LIBRARY = "pytorch_optimizer"


def _times(multiple: int) -> Callable[[Sequence[int], bool], int]:
    return lambda shape, last: multiple * math.prod(shape)


def _momentum(name: str, momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"{name}: momentum must be in [0, 1), got {momentum}.")


def _at_least_one(name: str, **numbers: int) -> None:
    for label, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: {label} must be a whole number of at least 1, not {number!r}.")


def _options_of(shared: Callable[..., Baseline]) -> Callable[[Callable[..., Baseline]], Callable[..., Baseline]]:
    """Gives a recipe, which passes its ``**options`` to ``shared``, the keyword options of ``shared`` before its own."""

    def extended(recipe: Callable[..., Baseline]) -> Callable[..., Baseline]:
        both = [*inspect.signature(shared).parameters.values(), *inspect.signature(recipe).parameters.values()]
        keywords = [each for each in both if each.kind is inspect.Parameter.KEYWORD_ONLY]
        recipe.__signature__ = inspect.Signature(keywords, return_annotation=Baseline)  # type: ignore[attr-defined]
        return recipe

    return extended


@register
def fo_sgd(*, lr: float = 1e-3, momentum: float = 0.0) -> Baseline:
    """SGD with backprop: ``torch.optim.SGD``.

    g = ∇L(θ),   m ← β m + g,   θ ← θ − η m

    State: none; with momentum m, one element per weight.
    """
    _momentum("fo-sgd", momentum)

    def build(setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.SGD(setting.groups, lr=setting.lr, momentum=momentum)

    kept = _times(1 if momentum else 0)
    return Baseline("fo-sgd", "SGD with backprop", "", lr, build=build, kept=kept, memory="1 × W" if momentum else "none")


@register
def fo_adamw(*, lr: float = 5e-5, adam_beta1: float = 0.9, adam_beta2: float = 0.999, adam_epsilon: float = 1e-8) -> Baseline:
    """AdamW with backprop: ``torch.optim.AdamW`` (1711.05101).

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← θ − η (m̂ / (√v̂ + ε) + λ θ)

    State: m and v, two elements per weight.
    """

    def build(setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.AdamW(setting.groups, lr=setting.lr, betas=(adam_beta1, adam_beta2), eps=adam_epsilon)

    return Baseline("fo-adamw", "AdamW with backprop", "1711.05101", lr, build=build, kept=_times(2), memory="2 × W")


@register
def hybrid(
    *,
    lr: float = 5e-5,
    zo_lr: float = 1e-6,
    eps: float = 1e-3,
    blocks: int = 1,
    update_rule: str = "AdamW",
    momentum: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
) -> Baseline:
    """Hybrid ZO-FO: backprop through the last blocks, forward passes alone for everything before them (2402.11592).

    c = (L(θ + εZ, φ) − L(θ − εZ, φ)) / 2ε,   θ ← θ − η_θ c Z,   g = ½ (∇_φ L(θ + εZ, φ) + ∇_φ L(θ − εZ, φ)) to AdamW or SGD

    φ: the last ``blocks`` blocks and the head, unless it shares its weight with the embeddings; θ: all else. Both come from the same two
    forwards. Activations before the first of the last blocks are not kept. η of φ is ``lr``, η_θ ``zo_lr``; a schedule scales both.
    State: two elements per weight of φ (AdamW), one (SGD with momentum) or none. There is no journal: a gradient is not a few
    coefficients. Forwards run in evaluation mode, without dropout, since both points must evaluate the same function. The paper does not
    say at which point the gradient is taken; the mean of both is that at θ up to ε².
    """
    _momentum("hybrid", momentum)
    _at_least_one("hybrid", blocks=blocks)
    if update_rule not in ("AdamW", "SGD"):
        raise ValueError(f"hybrid: update_rule must be 'AdamW' or 'SGD', not {update_rule!r}.")
    if update_rule == "AdamW" and momentum:
        raise ValueError("hybrid: AdamW has no momentum of this name: set adam_beta1, or update_rule='SGD'.")
    if update_rule == "SGD" and (adam_beta1, adam_beta2, adam_epsilon) != (0.9, 0.999, 1e-8):
        raise ValueError("hybrid: SGD takes none of adam_beta1, adam_beta2 and adam_epsilon: set momentum, or update_rule='AdamW'.")
    for label, number in (("eps", eps), ("zo_lr", zo_lr)):
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= (0 if label == "zo_lr" else 1e-12)):
            raise ValueError(f"hybrid: {label} must be a positive number, not {number!r}.")

    def build(setting: Setting) -> torch.optim.Optimizer:
        if update_rule == "SGD":
            return torch.optim.SGD(setting.groups, lr=setting.lr, momentum=momentum)
        return torch.optim.AdamW(setting.groups, lr=setting.lr, betas=(adam_beta1, adam_beta2), eps=adam_epsilon)

    multiple = 2 if update_rule == "AdamW" else 1 if momentum else 0
    return Baseline(
        "hybrid",
        "backprop in the last blocks, ZO before them",
        "2402.11592",
        lr,
        build=build,
        kept=_times(multiple),
        memory=f"{multiple} × last blocks" if multiple else "none",
        blocks=blocks,
        eps=eps,
        zo_lr=zo_lr,
        refusal=lambda model, trained: split_refusal(model, blocks),
    )


@register
def adahessian(
    *, lr: float = 1e-4, adam_beta1: float = 0.9, adam_beta2: float = 0.999, adam_epsilon: float = 1e-8, hessian_power: float = 1.0
) -> Baseline:
    """AdaHessian: Adam with the Hessian's diagonal in place of the gradient's square (2006.00719); pytorch-optimizer's.

    D = z ∘ H z,  z of ±1 (Hutchinson),   v ← β₂ v + (1 − β₂) D²,   θ ← θ − η m̂ / (v̂^(k/2) + ε)

    H z takes a second backward pass, through the first; attention runs without its fused kernels, which have no second derivative.
    State: m and v, two elements per weight.
    Departs from the paper: D is not averaged over blocks of a matrix (the block size is 1, as in its code for matrices), z is a function
    of (seed, step, name), and ε is Adam's, because at the paper's 1e-16 a weight that the loss does not see divides by zero.
    """

    def build(setting: Setting) -> torch.optim.Optimizer:
        from pytorch_optimizer import AdaHessian

        return AdaHessian(
            setting.groups,
            lr=setting.lr,
            betas=(adam_beta1, adam_beta2),
            eps=adam_epsilon,
            hessian_power=hessian_power,
            weight_decouple=True,
        )

    return Baseline(
        "adahessian", "AdaHessian", "2006.00719", lr, build=build, kept=_times(2), memory="2 × W", curvature=True, package=_LIBRARY
    )


@register
def sgd_sai(*, lr: float = 1e-4, momentum: float = 0.9) -> Baseline:
    """SGD-SaI: SGD with momentum, each tensor's rate scaled once by its first gradient's signal-to-noise (2412.11768); pytorch-optimizer's.

    s = ‖g₀‖ / (std(g₀) + ε),   m ← β m + (1 − β) g,   θ ← θ − η s m

    Vectors, which have no std in the paper's sense, take s = ‖g₀‖. A tensor whose first gradient is 0 is never trained, as LoRA's A, whose
    B starts at 0. State: m, one element per weight, and s, one per tensor.
    """
    _momentum("sgd-sai", momentum)

    def build(setting: Setting) -> torch.optim.Optimizer:
        from pytorch_optimizer import SGDSaI

        return SGDSaI(setting.groups, lr=setting.lr, momentum=momentum)

    def kept(shape: Sequence[int], last: bool) -> int:
        return (math.prod(shape) if momentum else 0) + 1

    return Baseline("sgd-sai", "SGD-SaI", "2412.11768", lr, build=build, kept=kept, memory="1 × W", package=_LIBRARY)


@register
def scale(
    *, lr: float = 1e-4, momentum: float = 0.9, adam_beta1: float = 0.9, adam_beta2: float = 0.999, adam_epsilon: float = 1e-8
) -> Baseline:
    """SCALE: gradients normalized by column, momentum in the last layer alone (2506.16659).

    C(g)_i = g_i / rms(g_i) over the weights into output i,   last layer: m ← β m + (1 − β) g,  θ ← θ − η C(m);   others: θ ← θ − η C(g)

    The column of a weight (out, in) of torch is its row; that of an embedding is a feature over the vocabulary. Vectors go by Adam.
    State: m, one element per weight of the last layer, and two per element of a vector. No maintained package has it. As in its authors'
    code the columns have a root mean square of 1, where the paper's text has a norm of 1: the rates differ by √n.
    """
    _momentum("scale", momentum)

    def build(setting: Setting) -> torch.optim.Optimizer:
        embeddings = {id(m.weight) for m in setting.model.modules() if isinstance(m, nn.Embedding)}
        tables = {key for key, owner in setting.owners.items() if id(owner) in embeddings} - setting.last
        betas = (adam_beta1, adam_beta2)
        return SCALE(setting.groups, setting.lr, momentum, betas, adam_epsilon, last=setting.last, tables=frozenset(tables))

    def kept(shape: Sequence[int], last: bool) -> int:
        return 2 * math.prod(shape) if len(shape) < 2 else math.prod(shape) if last else 0

    def refusal(model: nn.Module, trained: Shapes) -> str | None:
        if any(len(shape) >= 2 for shape in trained.values()):
            return None
        return "it normalizes the columns of matrices, and only vectors are trained there (it would be Adam): choose fo-adamw"

    return Baseline("scale", "SCALE", "2506.16659", lr, build=build, kept=kept, memory="1 × last layer", refusal=refusal)


def _galore(
    name: str,
    title: str,
    arxiv: str,
    random_share: float = 0.0,
    *,
    lr: float = 3e-5,
    rank: int = 4,
    interval: int = 500,
    scale: float = 4.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
) -> Baseline:
    _at_least_one(name, rank=rank, interval=interval)

    def build(setting: Setting) -> torch.optim.Optimizer:
        return galore_optimizer(setting, rank, interval, random_share, scale=scale, betas=(adam_beta1, adam_beta2), eps=adam_epsilon)

    def kept(shape: Sequence[int], last: bool) -> int:
        if len(shape) != 2 or min(shape) <= rank:
            return 2 * math.prod(shape)
        return rank * (2 * max(shape) + min(shape))

    def refusal(model: nn.Module, trained: Shapes) -> str | None:
        if any(len(shape) == 2 and min(shape) > rank for shape in trained.values()):
            return None
        return f"no matrix that is trained there has both sides above its rank {rank} (it would be Adam): choose fo-adamw or a smaller rank"

    return Baseline(name, title, arxiv, lr, build=build, kept=kept, memory="Σ r·(2m + n)", package=_LIBRARY, refusal=refusal)


@register
@_options_of(_galore)
def galore(**options: Any) -> Baseline:
    """GaLore: Adam on the gradient's projection to its leading singular vectors (2403.03507); pytorch-optimizer's.

    g (m, n), m ≥ n:   P = the first r right singular vectors of g, anew every T steps,   R = g P,   θ ← θ − η α Adam(R) Pᵀ

    and on the left where m < n. This trains matrices; all others are trained by Adam. The defaults are its authors' for fine-tuning on
    GLUE. State: P and two moments of R: r·(2m + n) elements for m ≥ n.
    """
    return _galore("galore", "GaLore", "2403.03507", **options)


@register
@_options_of(_galore)
def golore(*, random_share: float = 0.5, **options: Any) -> Baseline:
    """GoLore: GaLore whose projections are random in the last part of a run, when gradients are mostly noise (2410.11289).

    P = QR of an n × r Gaussian, uniform among the orthonormal frames, from step (1 − share)·T_max on; before it as in GaLore

    State: GaLore's. pytorch-optimizer's ``projection_type="random"`` is not it: it takes singular vectors there too (GaLore's step does
    not ask for random ones), and where asked, P is Gaussian and not orthonormal.
    """
    if not 0 <= random_share <= 1:
        raise ValueError(f"golore: random_share must be in [0, 1], got {random_share}.")
    return _galore("golore", "GoLore", "2410.11289", random_share, **options)


def _mkor(
    name: str,
    title: str,
    hybrid: tuple[int, float] | None = None,
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    gamma: float = 0.95,
    interval: int = 10,
    stabilizer: float = 0.1,
    threshold: float = 2.0,
    max_side: int = 4096,
) -> Baseline:
    options = {"momentum": momentum, "gamma": gamma, "stabilizer": stabilizer, "threshold": threshold}
    _at_least_one(name, interval=interval, max_side=max_side)
    _momentum(name, momentum)

    def build(setting: Setting) -> torch.optim.Optimizer:
        return MKOR(setting, interval=interval, max_side=max_side, hybrid=hybrid, **options)

    def kept(shape: Sequence[int], last: bool) -> int:
        factors = sum(side * side for side in shape) if len(shape) == 2 and max(shape) <= max_side else 0
        return factors + (math.prod(shape) if momentum else 0)

    def refusal(model: nn.Module, trained: Shapes) -> str | None:
        if any(name in trained for name in preconditioned(model, max_side)):
            return None
        larger = [max(trained[name]) for name in preconditioned(model, 1 << 60) if name in trained]
        if larger:
            return f"the Linear layers trained there are larger than max_side={max_side}; choose fo-sgd, or a max_side of {min(larger)}"
        return "no Linear layer is trained there, and nothing else has its two factors: choose fo-sgd"

    return Baseline(name, title, "2306.01685", lr, build=build, kept=kept, memory="Σ (m² + n²) + 1 × W", refusal=refusal)


@register
@_options_of(_mkor)
def mkor(**options: Any) -> Baseline:
    """MKOR: Kronecker-factored curvature whose inverses are kept up to date by rank-1 changes (2306.01685).

    L ← γ L + (1 − γ) ĝ ĝᵀ,  R ← γ R + (1 − γ) â âᵀ,  every ``interval`` steps; ĝ, â: a layer's mean output gradient and input
    with J = L⁻¹:  J ← (J − (1 − γ) J ĝ ĝᵀ J / (γ + (1 − γ) ĝᵀ J ĝ)) / γ   (Sherman–Morrison), and likewise for R
    where max|J| > threshold:  J ← (1 − ζ) J + ζ I;   Δ = L⁻¹ G R⁻¹,  Δ ← Δ ‖G‖ / ‖Δ‖,  then SGD with momentum

    This trains Linear weights; all else is trained by SGD. State: L⁻¹ and R⁻¹, m² + n² elements per matrix, and momentum.
    No maintained package has it. Departs from its authors' code: factors are float32, not half precision; a bias is not a column of its
    weight but is trained by SGD; layers with a side above ``max_side`` (the head; the authors leave out the last layer) are trained by SGD.
    """
    return _mkor("mkor", "MKOR", **options)


@register
@_options_of(_mkor)
def mkor_h(*, window: int = 100, least_gain: float = 0.01, **options: Any) -> Baseline:
    """MKOR-H: MKOR that changes to first order once second order no longer speeds it up (2306.01685).

    From the first window of steps in which the mean loss falls by less than ``least_gain`` of itself, Δ = G: SGD with momentum.

    The paper says that the loss's rate of reduction decides, not how; window and gain are ours. State: MKOR's until then, then momentum.
    """
    _at_least_one("mkor-h", window=window)
    return _mkor("mkor-h", "MKOR-H", (window, least_gain), **options)
