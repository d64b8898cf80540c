"""A method: the four choices that make a zeroth-order step, validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zotune.io.suggest import did_you_mean_or
from zotune.methods.best import BestPoint
from zotune.methods.coefficients import FITNESS, ByDeviation, CoefficientTransform, ConservativeStep, Shaping
from zotune.methods.estimators import ESTIMATORS
from zotune.methods.history import CoefficientHistory
from zotune.methods.kernel import Kernel
from zotune.methods.layer_projection import LayerProjection
from zotune.methods.output_window import OutputWindow
from zotune.methods.rules import Rule
from zotune.methods.selection import Selection
from zotune.methods.svrg import SVRGSchedule
from zotune.rng import sparse_directions
from zotune.subspaces import Full, Guided, HessianScaled, Subspace
from zotune.subspaces.coordinate import is_thin
from zotune.subspaces.matrix_view import matrix_view

#: For a learning rate or ε that is measured instead of given.
AUTO = "auto"
#: What a method's estimate may be of the gradient.
ESTIMATES = ("gradient", "direction", "descent")

#: How updates far below the spacing of half-precision weights are kept.
ROUNDING = ("stochastic", "residual")

#: What shares a direction: the whole batch, a group of neighboring examples, or one example.
DIRECTIONS_PER = ("batch", "group", "example")


@dataclass(frozen=True)
class Method:
    """The four choices that make a zeroth-order step, validated.

    Args:
        name: the method's one name.
        title: what to call it in a table.
        arxiv: id of the paper; of its page at OpenReview where it is not on arXiv.
        lr: default learning rate η (the paper's, for models of a billion parameters; small models need far larger ones).
        eps: perturbation scale ε, or ``"auto"`` (see ``optim.calibration``).
        num_directions: directions for each batch, group or example (see ``directions_per``).
        directions_per: what has directions of its own: the ``"batch"`` (all examples of a step share them), every ``"group"`` of
            neighboring examples, or every ``"example"``.
        group_size: examples per group; 1 unless ``directions_per`` is ``"group"``.
        subspace: see ``subspaces``.
        direction: see ``rng.directions`` and ``rng.sparse_directions``.
        estimator: a name of ``estimators.ESTIMATORS``.
        update_rule: name or class of a torch optimizer, or a name of ``methods.rules``.
        update_rule_args: its keyword arguments besides lr.
        update_rule_state: float32 elements of its state per coordinate.
        update_rule_vector_state: the same of vectors; None: equal.
        fitness: how the points of a step are compared: by the loss itself (``"loss"``, or ``"raw"``), by its ``"z-score"`` or centered
            ``"ranks"`` over the points, or by the mean of every example's z-score (``"prompt-z-score"``; see ``methods.coefficients``).
        shaping: transform of the coefficients before the rule; None: none.
        rounding: of half-precision weights that are written every step: ``"stochastic"``, unbiased and keyed by the step, without state;
            or ``"residual"``: 16 more bits beside every weight, so that nothing is rounded away. Thin weights have residuals always.
        history: moments from the history of coefficients, in place of the rule.
        svrg: steps relative to an SVRG snapshot, by plain SGD.
        kernel: random lengths of the differences, and their weights.
        selection: a direction chosen from candidates by their losses.
        projection: searches for how far layers are moved.
        conservative: evaluate θ − ηĝ, θ and θ + ηĝ too, and take the one of the lowest loss.
        estimates: the mean of the estimate that the rule takes: the ``"gradient"`` itself (of the smoothed loss), a multiple of it (its
            ``"direction"``), or only a direction of ``"descent"``.
        reach: what is trained: ``"all"`` weights; ``"rows"``: one element per row of a matrix, added to the whole row; ``"span"``: a
            subspace of a matrix that is fixed for the run; ``"part"``: some elements of a matrix, the same ones for many steps.
        blocks: blocks of the model with ``num_directions`` directions each (see ``subspaces.blockwise``); the optimizer sets it.
        options: the recipe's keyword arguments, for headers and reports.

    Raises:
        ValueError: a field makes no sense, with the fix.
    """

    name: str
    title: str
    arxiv: str
    lr: float
    eps: float | str = 1e-3
    num_directions: int = 1
    directions_per: str = "batch"
    group_size: int = 1
    subspace: Subspace = field(default_factory=Full)
    direction: str = "gaussian"
    estimator: str = "central"
    update_rule: str | type[torch.optim.Optimizer] = "SGD"
    update_rule_args: dict[str, Any] = field(default_factory=dict)
    update_rule_state: float = 0
    update_rule_vector_state: float | None = None
    fitness: str = "loss"
    rounding: str = "stochastic"
    shaping: Shaping | None = None
    history: CoefficientHistory | None = None
    svrg: SVRGSchedule | None = None
    kernel: Kernel | None = None
    selection: Selection | None = None
    projection: LayerProjection | None = None
    conservative: bool = False
    estimates: str = "gradient"
    reach: str = "all"
    blocks: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = isinstance(self.eps, (int, float)) and math.isfinite(self.eps) and self.eps > 0
        if not (number or self.eps == AUTO):
            raise ValueError(f"eps must be a positive number or 'auto', not {self.eps!r}.")
        self._check_directions()
        if self.rounding not in ROUNDING:
            raise ValueError(f"unknown rounding {self.rounding!r}{did_you_mean_or(self.rounding, ROUNDING, 'choose one of')}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {self.estimator!r}; choose one of {', '.join(ESTIMATORS)}.")
        sparse_directions.directions(self.direction, {})
        Rule(self.update_rule, self.update_rule_args)
        self._check_together()

    def _check_directions(self) -> None:
        if not _whole(self.num_directions):
            raise ValueError(
                f"num_directions must be a whole number of at least 1, not {self.num_directions!r}; "
                "directions_per gives every example or group directions of its own."
            )
        if self.directions_per not in DIRECTIONS_PER:
            raise ValueError(
                f"unknown directions_per {self.directions_per!r}{did_you_mean_or(self.directions_per, DIRECTIONS_PER, 'choose one of')}"
            )
        if not _whole(self.group_size):
            raise ValueError(f"group_size must be a whole number of at least 1, not {self.group_size!r}.")
        if self.directions_per == "group" and self.group_size == 1:
            raise ValueError("directions_per='group' needs group_size, the examples per group: at least 2 (1 is directions_per='example').")
        if self.directions_per != "group" and self.group_size != 1:
            raise ValueError(f"group_size={self.group_size} needs directions_per='group', not {self.directions_per!r}.")

    def _check_together(self) -> None:
        if self.rounding == "residual" and not self.subspace.full:
            raise ValueError(f"{self.name} writes no weight of the model at each step, so that none is rounded; leave rounding out.")
        assert self.estimates in ESTIMATES and self.reach in ("all", "rows", "span", "part"), (self.estimates, self.reach)
        shared = not self.own
        self._check_fitness()
        if isinstance(self.shaping, ByDeviation) and shared and self.num_directions == 1:
            raise ValueError(f"{self.name} divides by the deviation of its directions' losses: set num_directions to at least 2.")
        if self.blocks > 1 and not shared:
            raise ValueError(f"{self.name} gives each block directions of its own: set directions_per to 'batch'.")
        if self.estimator == "curvature" and not (shared and isinstance(self.subspace, HessianScaled)):
            raise ValueError("the estimator 'curvature' is HiZOO's: take method 'hizoo', with directions_per 'batch'.")
        if isinstance(self.subspace, HessianScaled) and self.estimator != "curvature":
            raise ValueError(f"{self.name} learns from curvature: leave its estimator at 'curvature'.")
        if self.estimator == "tangent" and not (shared and isinstance(self.subspace, Full)):
            raise ValueError("the estimator 'tangent' differentiates along one direction in full space: take method 'forward-grad'.")
        if self.conservative and not (shared and self.num_directions == 1):
            raise ValueError(f"{self.name} compares steps along one direction: set num_directions to 1, directions_per to 'batch'.")
        if self.kernel and not (shared and self.estimator == "central" and self.fitness == "loss"):
            raise ValueError(f"{self.name} weights central differences: set estimator to 'central', directions_per to 'batch'.")
        if self.estimator == "leave-one-out" and not (shared and self.num_directions > 1):
            raise ValueError(f"{self.name} compares directions: set num_directions to at least 2, directions_per to 'batch'.")
        if self.selection and not (self.estimator == "leave-one-out" and self.fitness == "loss" and self.blocks == 1):
            raise ValueError(f"{self.name} compares the losses of candidates: set estimator to 'leave-one-out', fitness to 'loss'.")
        if self.svrg and not shared:
            raise ValueError(f"{self.name} evaluates the same directions at two points: set directions_per to 'batch'.")
        if (self.history or self.svrg) and not Rule(self.update_rule, self.update_rule_args).plain:
            raise ValueError(f"{self.name} has its own update; leave update_rule at SGD.")
        history = None if self.subspace.quantized else self.history
        beyond = history or self.selection or self.conservative or self.svrg or self.projection
        if beyond and not isinstance(self.subspace, Full):
            raise ValueError(f"{self.name} trains weights in full space, not in a subspace.")

    def _check_fitness(self) -> None:
        if self.fitness not in FITNESS:
            raise ValueError(f"unknown fitness {self.fitness!r}{did_you_mean_or(self.fitness, FITNESS, 'choose one of')}")
        if FITNESS[self.fitness] is None:
            return
        if self.own or self.estimator != "central":
            raise ValueError(
                f"fitness={self.fitness!r} compares all points of a step on the same examples, in pairs θ ± εZ, which {self.name} does not "
                "have as it is: set directions_per to 'batch' and estimator to 'central'."
            )
        if self.shaping or self.svrg or self.conservative:
            raise ValueError(f"{self.name} needs the differences of the losses themselves: set fitness to 'loss'.")

    @property
    def url(self) -> str:
        """Where the paper is."""
        return f"https://arxiv.org/abs/{self.arxiv}" if "." in self.arxiv else f"https://openreview.net/forum?id={self.arxiv}"

    @property
    def own(self) -> bool:
        """Whether groups or examples have directions of their own."""
        return self.directions_per != "batch"

    def parts(self, rows: int) -> int:
        """Groups of a step of ``rows`` examples, where groups (of one example or more) have directions of their own."""
        assert self.own
        return max(1, rows // self.group_size)

    def directions_of(self, rows: int) -> int:
        """K in a step of ``rows`` examples."""
        return self.num_directions * (self.parts(rows) if self.own else self.blocks)

    @property
    def lengths(self) -> Callable[[int, int, int], float] | None:
        """The length of a direction at a point, in units of ε, by (seed, step, direction), where they differ."""
        if isinstance(self.shaping, BestPoint):
            return self.shaping.length
        return None if self.kernel is None else self.kernel.length

    @property
    def transforms(self) -> tuple[CoefficientTransform, ...]:
        """What coefficients pass between the estimator and the update rule, in order."""
        conservative = ConservativeStep() if self.conservative else None
        own = (self.kernel, self.svrg, self.selection, conservative, self.shaping, self.history, self.projection)
        found = (FITNESS[self.fitness], *own)
        return tuple(transform for transform in found if transform is not None)

    @property
    def num_points(self) -> int:
        """Points at which a step evaluates an example."""
        return len(ESTIMATORS[self.estimator].points(self.num_directions * (1 if self.own else self.blocks)))

    def forwards(self, step: int) -> int:
        """Evaluations of the batch that step number ``step`` makes."""
        points = self.num_points
        return points + sum(transform.extra_forwards(step, points) for transform in self.transforms)

    @property
    def forwards_per_step(self) -> int:
        """:meth:`forwards` of a step, the most it can be."""
        return self.forwards(-1)

    @property
    def forwards_text(self) -> str:
        """:attr:`forwards_per_step` as text: a step of a guided phase is one evaluation."""
        most = str(self.forwards_per_step)
        return f"1 or {most}" if isinstance(self.subspace, Guided) else most

    @property
    def scalars(self) -> int:
        """Scalars of state between steps, whatever the size of the model."""
        directions = 1 if self.own else self.directions_of(0)
        return sum(transform.scalars(directions) for transform in self.transforms)

    def state_bytes(self, shapes: Sequence[Sequence[int]], *, half: bool = False) -> int:
        """Bytes of state between steps beyond the weights, for trainable parameters of these shapes.

        Subspace factors and rule state are float32; half-precision weights may have a residual (see ``rounding``). Where a projection
        chooses layers by name, all matrices count.
        """
        return math.ceil(sum(self._state_of(shape, half) for shape in shapes))

    def _state_of(self, shape: Sequence[int], half: bool) -> float:
        moving, beside = self.subspace.elements(shape)
        whole = moving == math.prod(shape)
        in_full_space = self.subspace.full or whole
        residual = half and in_full_space and (self.rounding == "residual" or is_thin(shape) or not whole)
        vector = self.update_rule_vector_state if matrix_view(shape) is None else None
        state = self.update_rule_state if vector is None else vector
        starts = (2 if half else 4) * moving if self.projection and len(shape) > 1 else 0
        return 4 * (beside + state * moving) + (2 * moving if residual else 0) + starts

    @property
    def extra_memory(self) -> str:
        """State between steps beyond the weights, as text: in multiples of the trainable weights W, or by matrix (m, n)."""
        if not self.subspace.full:
            return self.subspace.memory(self.update_rule_state)
        if self.projection:
            return "1 × the projected W"
        kept = self.subspace.memory(self.update_rule_state)
        if isinstance(self.history, OutputWindow):
            return f"{self.history.length - 1}·d bfloat16"
        if kept == "none" and self.scalars:
            kept = f"{self.scalars} scalars"
        half = self._state_of((1024, 1024), True) / (2 * 1024 * 1024)
        return f"{kept} (half precision: {half:.3g} × W)" if half else kept


def _whole(value: object) -> bool:
    return isinstance(value, int) and value >= 1
