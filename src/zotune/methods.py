"""Methods: named choices of subspace, direction, estimator and update rule, with the defaults of their papers.

A recipe is a function of keyword options that returns a :class:`Method`; registering it is all it takes to have it in the command, the
tests, the tables and the grids. The name on the command line is the function's, with hyphens: ``lozo_m`` is ``lozo-m``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zotune.directions import Directions
from zotune.estimators import ESTIMATORS
from zotune.rules import Rule
from zotune.subspaces import Full, LowRank, Subspace

#: For a learning rate or ε that is measured instead of given.
AUTO = "auto"


@dataclass(frozen=True)
class Method:
    """The four choices that make a zeroth-order step, validated.

    Args:
        name: the method's one name.
        title: what to call it in a table.
        arxiv: id of the paper.
        lr: default learning rate η (the paper's, for models of a billion parameters; small models want far larger ones).
        eps: perturbation scale ε, or ``"auto"`` (see ``calibration``).
        num_directions: K; ``"example"`` for a direction per example, ``"example:m"`` for m of them, ``"groups:G"`` for one per G-th part
            of the batch.
        subspace: see ``subspaces``.
        direction: see ``directions``.
        estimator: ``"central"`` or ``"forward"``.
        rule: name or class of a torch optimiser, or one of ``rules``.
        rule_args: its keyword arguments besides lr.
        rule_state: numbers the rule keeps for each coordinate.
        options: the recipe's keyword arguments, for headers and reports.

    Raises:
        ValueError: a field makes no sense, with the fix.
    """

    name: str
    title: str
    arxiv: str
    lr: float
    eps: float | str = 1e-3
    num_directions: int | str = 1
    subspace: Subspace = field(default_factory=Full)
    direction: str = "gaussian"
    estimator: str = "central"
    rule: str | type[torch.optim.Optimizer] = "SGD"
    rule_args: dict[str, Any] = field(default_factory=dict)
    rule_state: float = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = isinstance(self.eps, (int, float)) and math.isfinite(self.eps) and self.eps > 0
        if not (number or self.eps == AUTO):
            raise ValueError(f"eps must be a positive number or 'auto', not {self.eps!r}.")
        if not (self.groups is not None or (isinstance(self.num_directions, int) and self.num_directions >= 1)):
            raise ValueError(
                f"num_directions must be a whole number of at least 1, 'example', 'example:m' or 'groups:G', not {self.num_directions!r}."
            )
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {self.estimator!r}; choose one of {', '.join(ESTIMATORS)}.")
        Directions(self.direction)
        Rule(self.rule, self.rule_args)

    @property
    def groups(self) -> float | None:
        """Parts of a step's examples that have directions of their own: G, infinity for every example; None if directions are shared."""
        parsed = _own_directions(self.num_directions)
        return None if parsed is None else parsed[0]

    @property
    def each(self) -> int:
        """Directions that each such part has."""
        parsed = _own_directions(self.num_directions)
        return 1 if parsed is None else parsed[1]

    def directions_of(self, rows: int) -> int:
        """K in a step of ``rows`` examples."""
        if isinstance(self.num_directions, int):
            return self.num_directions
        assert self.groups is not None
        return int(min(rows, self.groups)) * self.each

    @property
    def forwards_per_step(self) -> int:
        """Evaluations of the batch a step makes."""
        estimator = ESTIMATORS[self.estimator]
        count = self.num_directions if isinstance(self.num_directions, int) else self.each
        return len(estimator.points(count))

    def state_bytes(self, shapes: Sequence[Sequence[int]], *, half: bool = False) -> int:
        """Bytes kept between steps beyond the weights, for trainable parameters of these shapes.

        Subspace factors and rule state are float32; half-precision weights that move in full space keep a 16-bit residual.
        """
        total = 0.0
        for shape in shapes:
            moving, beside = self.subspace.elements(shape)
            in_full_space = moving == math.prod(shape)
            total += 4 * (beside + self.rule_state * moving) + (2 * moving if half and in_full_space else 0)
        return math.ceil(total)

    @property
    def extra_memory(self) -> str:
        """What is kept between steps beyond the weights, for people: in multiples of the trainable weights W, or by matrix (m, n)."""
        kept = self.rule_state
        if isinstance(self.subspace, Full):
            # In half precision W is 2 bytes a number, the rule's float32 state 4, and the residual 2.
            return f"{f'{kept:g} × W' if kept else 'none'} (half precision: {2 * kept + 1:g} × W)"
        factors = "Σ r·(m + n)"
        return factors if not kept else f"{factors} + r·m" if kept == 1 else f"{factors} + {kept:g}·r·m"


def _own_directions(spelled: int | str) -> tuple[float, int] | None:
    """(parts, directions each) of ``"example"``, ``"example:m"``, ``"groups:G"``; None for anything else."""
    if not isinstance(spelled, str):
        return None
    word, colon, text = spelled.partition(":")
    number = int(text) if text.isdecimal() else 0
    if word == "example" and (number or not colon):
        return math.inf, number or 1
    return (number, 1) if word == "groups" and number else None


Recipe = Callable[..., Method]
_RECIPES: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Enter a recipe under its function's name. Its keyword defaults are the method's defaults."""
    name = recipe.__name__.replace("_", "-")

    @functools.wraps(recipe)
    def build(**options: Any) -> Method:
        known = options_of(name)
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}."
                raise ValueError(f"method {name!r} has no option {option!r}; {hint}")
        method = recipe(**options)
        assert method.name == name, f"recipe {name} names its method {method.name}"
        return dataclasses.replace(method, options=known | options)

    _RECIPES[name] = build
    return build


def options_of(name: str) -> dict[str, Any]:
    """The keyword options of a method, with their defaults."""
    signature = inspect.signature(inspect.unwrap(recipe(name)))
    return {option: parameter.default for option, parameter in signature.parameters.items()}


options = options_of


def names() -> list[str]:
    """The methods there are."""
    return list(_RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none, with the nearest.
    """
    if name not in _RECIPES:
        near = difflib.get_close_matches(name.replace("_", "-").lower(), _RECIPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_RECIPES)}."
        raise ValueError(f"unknown method {name!r}; {hint}")
    return _RECIPES[name]


def get(name: str, **options: Any) -> Method:
    """The method of a name, its defaults overridden by ``options``.

    Example:
        >>> get("lozo", rank=4).subspace.rank
        4
    """
    return recipe(name)(**options)


@register
def mezo(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """MeZO, or ZO-SGD: plain SGD on the n-SPSA estimate, in full space (2305.17333).

    c = (L(θ + εZ) − L(θ − εZ)) / 2ε,   θ ← θ − η c Z,   Z ~ N(0, I)

    State: none in float32; a 16-bit residual for half-precision weights, so that updates far below their spacing add up.
    Departs from the published code: no weight is written to evaluate, the global generator is not reseeded, every parameter draws from
    its own key, gradient accumulation works, and the seeds and coefficients are on file (the journal).
    With ``rule`` any torch optimiser takes the place of SGD.
    """
    return Method(
        name="mezo",
        title="MeZO",
        arxiv="2305.17333",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule=rule,
        rule_args=rule_args or {},
    )


@register
def mezo_momentum(
    *,
    lr: float = 1e-6,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    momentum: float = 0.9,
) -> Method:
    """MeZO with heavy-ball momentum, or ZO-SGD-MMT (2305.17333, 2402.11592).

    m ← β m + ĝ,   θ ← θ − η m,   β = 0.9

    State: m, one float32 number a weight.
    """
    return Method(
        name="mezo-momentum",
        title="MeZO-momentum",
        arxiv="2305.17333",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="SGD",
        rule_args={"momentum": momentum},
        rule_state=1,
    )


@register
def mezo_adam(
    *,
    lr: float = 1e-5,
    eps: float | str = 1e-3,
    num_directions: int | str = 1,
    direction: str = "gaussian",
    estimator: str = "central",
    betas: tuple[float, float] = (0.9, 0.999),
) -> Method:
    """MeZO with Adam, or ZO-Adam (2305.17333).

    m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) ĝ²,   θ ← θ − η m̂ / (√v̂ + 1e-8)

    State: m and v, two float32 numbers a weight.
    """
    return Method(
        name="mezo-adam",
        title="MeZO-Adam",
        arxiv="2305.17333",
        lr=lr,
        eps=eps,
        num_directions=num_directions,
        direction=direction,
        estimator=estimator,
        rule="Adam",
        rule_args={"betas": tuple(betas)},
        rule_state=2,
    )


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
    num_directions: int | str = "example",
    direction: str = "gaussian",
    estimator: str = "central",
    rank: int = 1,
    interval: int = 50,
    rule: str = "SGD",
    rule_args: dict[str, Any] | None = None,
) -> Method:
    """LOZO-E: LOZO with a direction per example, zotune's own choice (LOZO 2410.07698; GRZO 2606.02857).

    c_b = (ℓ_b(W + ε U_b Vᵀ) − ℓ_b(W − ε U_b Vᵀ)) / 2ε,   W ← W − η (1/B) Σ_b c_b U_b Vᵀ / r

    Each example b of the batch is evaluated under its own direction, in the two forwards that one direction for all would take. The
    noise of the directions, ‖∇ℓ_b‖² times the number of dimensions, is averaged over B of them; the rate can be up to B times larger.
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
        subspace=LowRank(rank, interval),
        rule=rule,
        rule_args=rule_args or {},
    )


def recommended(**options: Any) -> Method:
    """The library's own choice, and the default of ``zotune train``."""
    return get("lozo-e", **options)
