"""Low rank: W + A Vᵀ with a trained factor A and a fixed factor V that is redrawn every interval."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key
from zotune.subspaces.base import Subspace, at_least_one
from zotune.subspaces.coordinate import Coordinate, MomentTransport, Offset, matching, unshared
from zotune.subspaces.factory import full_coordinate
from zotune.subspaces.matrix_view import MatrixView, matrix_view
from zotune.weights import placement, quantized_linear
from zotune.weights.placement import is_sharded


class LowRankCoordinate(Coordinate):
    """θ = A of W + A Vᵀ: W (m, n) the parameter as stored, A (m, r) float32, V (n, r) ~ N(0, 1) redrawn every ``interval`` steps.

    A starts at 0 after each redraw; the redraw folds A Vᵀ into W. In between W is not written: low-rank hooks of the modules that own W add
    (x V) Aᵀ to their outputs. Without hooks (``uses_hook`` False) every update is folded at once and A is always 0.

    A tensor of another shape counts as a matrix, or as a stack of E matrices that have factors each, A (E, m, r) and V (E, n, r) (see
    ``matrix_view``).

    The gradient in A is G V. LOZO's update −η c U Vᵀ / r (2410.07698) is SGD on A with rate η / r (``lr_scale``), so that
    E[c U Vᵀ] / r = G: unbiased for the whole matrix.

    Subclasses have θ of another shape, from which A follows linearly (:meth:`expand`), or another fixed factor (:meth:`redraw`). With
    ``transposed`` the left factor is fixed: W + V Aᵀ, V (m, r), A (n, r).

    Attributes:
        core: θ.
        hook_core: what the hooks add: θ, θ + offset during an evaluation, None where the hooks add nothing.
        scale: σ of the layer (see ``layer_scales``), a factor of V.
        pending: whether θ is nonzero.
        keep: weight decay that the next fold applies to W.
        updated_at: (seed, step) of the last update, the key of the fold's rounding.
    """

    transposed = False
    supports_offload = True
    decays_weights = False

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int) -> None:
        view = matrix_view(parameter.shape)
        assert view is not None, f"{name} is a vector"
        self.matrices: MatrixView = view
        moving, fixed = (view.columns, view.rows) if self.transposed else (view.rows, view.columns)
        super().__init__(name, parameter, (*view.stack, *self.core_shape(moving, rank)), lr_scale=self.core_rate(rank))
        self.rank, self.interval = rank, interval
        self.scale = 1.0
        self.uses_hook = True
        self.core = torch.zeros(self.shape, device=parameter.device)
        self.v = torch.zeros(*view.stack, fixed, rank, device=parameter.device)
        self.pending = False
        self.keep = 1.0
        self.hook_core: Tensor | None = self.core
        self.updated_at = (0, 0)
        self._merged: weakref.ref[Tensor] | None = None
        self._weight = full_coordinate(name, parameter, keep_residual=False)

    # -- what subclasses override -----------------------------------------------------------------------------------------------------

    def core_shape(self, moving: int, rank: int) -> tuple[int, ...]:
        """The shape of θ of one matrix, for a trained factor of ``moving`` rows."""
        return moving, rank

    def core_rate(self, rank: int) -> float:
        """The learning-rate scale."""
        return 1.0 / rank

    def expand(self, core: Tensor) -> Tensor:
        """The trained factor A of θ, (..., rows of A, r) for θ (..., *shape); linear."""
        return core

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        """Draw the fixed factors of an interval; the map of first moments of θ to the new factors."""
        v = self._gaussian(seed, redraw, "subspace", self.v.shape)
        if self.scale != 1.0:
            v *= self.scale
        v = self._row_major(v)
        transport = self.v.mT @ v / (v.shape[-2] * self.scale**2)
        if self.device.type != "cpu" and v.stride() == self.v.stride():
            self.v.copy_(v)  # a CUDA graph reads it there
        else:
            self.v = v
        return lambda moment: moment @ transport

    def kept(self) -> list[Tensor]:
        return [self.core, self.v, *self._weight.kept()]

    def _gaussian(self, seed: int, redraw: int, purpose: str, shape: Sequence[int]) -> Tensor:
        return Directions("gaussian").draw(Key(seed, redraw, 0, self.name, purpose), tuple(shape), self.device)

    @staticmethod
    def _row_major(v: Tensor) -> Tensor:
        return v.mT.contiguous().mT  # Vᵀ contiguous: x V is many times faster on a CPU

    # -- θ, A and the weight ----------------------------------------------------------------------------------------------------------

    @property
    @tagged("directions")
    def a(self) -> Tensor:
        """The trained factor."""
        return self.expand(self.core)

    @tagged("directions")
    def factors(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """(left, right) of the product that θ adds to W, (m, r) and (n, r), for each matrix of a stack."""
        a = self.expand(core)
        return (self.v, a) if self.transposed else (a, self.v)

    @tagged("directions")
    def begin_step(self, seed: int, step: int) -> MomentTransport | None:
        if step % self.interval if self.interval else step:
            return None
        self.fold()
        transport = self.redraw(seed, self._redraws(step))
        return transport if step else None

    @tagged("directions")
    def rescale(self, scale: float, seed: int, step: int) -> MomentTransport:
        """Change σ at a redraw; the map of first moments of θ."""
        assert not self.pending and step % self.interval == 0, f"{self.name} was updated since V was drawn"
        ratio, self.scale = scale / self.scale, scale
        self.redraw(seed, self._redraws(step))
        return lambda moment: moment / ratio

    def _redraws(self, step: int) -> int:
        return step // self.interval if self.interval else 0

    @tagged("directions")
    def core_at(self, directions: Directions, offset: Offset | None) -> Tensor:
        """θ + offset; None: θ."""
        if offset is None:
            return self.core
        u = self.draw(directions, offset.seed, offset.step, offset.direction, 1)[0]
        return torch.add(self.core, u, alpha=offset.scale)

    def set_hook_core(self, directions: Directions, offset: Offset | None) -> None:
        """Have the hooks add the product of θ + offset (None: of θ)."""
        self.hook_core = self.core_at(directions, offset)

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        if offset is None and not self.pending:
            return self.parameter.detach()
        return self._weight.plus_product(*self.factors(self.core_at(directions, offset)))

    @tagged("directions")
    def rows_at(self, directions: Directions, offset: Offset, rows: Tensor) -> Tensor:
        """Rows ``rows`` (int64, (R,)) of :meth:`at`, without the others."""
        return self._weight.product_rows(*self.factors(self.core_at(directions, offset)), rows)

    def strips_at(self, directions: Directions, offset: Offset, height: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, these rows of :meth:`at`) for strips of ``height`` rows."""
        return self._weight.product_strips(*self.factors(self.core_at(directions, offset)), height)

    def value(self) -> Tensor:
        return self.core

    @tagged("directions")
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        if value.data_ptr() != self.core.data_ptr():
            self.core.copy_(value)
        self.mark_updated(1.0, seed, step)

    @tagged("directions")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        if keep != 1.0:
            self.core.mul_(keep)
        self._add_weighted(self.core, directions, weights, seed, step)
        self.mark_updated(keep, seed, step)

    def decay(self, keep: float) -> None:
        # W takes its decay at the next fold: up to an interval late, in exchange for no pass over W.
        if keep != 1.0:
            self.core.mul_(keep)
            self.keep *= keep

    def mark_updated(self, keep: float, seed: int, step: int) -> None:
        self.keep *= keep
        self.pending = True
        self.updated_at = (seed, step)
        self._merged = None
        if not self.uses_hook:
            self.fold()

    def stored_tensor(self) -> Tensor | None:
        return self.core

    @property
    def owned_tensor(self) -> Tensor | None:
        return self.core

    def rebind(self, memory: Tensor) -> None:
        at_theta = self.hook_core is self.core
        self.core = memory.view(self.shape)
        self.hook_core = self.core if at_theta else self.hook_core

    # -- folding ----------------------------------------------------------------------------------------------------------------------

    def set_anchor(self, anchor: Tensor | None) -> None:
        super().set_anchor(anchor)
        self._weight.set_anchor(anchor)

    @tagged("directions")
    def fold_every_step(self) -> None:
        """Stop using hooks. W is then written every step, as in full space."""
        assert not self.pending
        self.uses_hook = False
        self._weight = full_coordinate(self.name, self.parameter)
        if self.anchored:
            self._weight.set_anchor(self.anchor)

    @property
    def _unchanged(self) -> bool:
        return not self.pending and self.keep == 1.0

    @tagged("directions")
    def fold(self) -> None:
        """W ← keep · W + A Vᵀ, θ ← 0; a half-precision W rounds stochastically, keyed by the last update's step.

        With an anchor W₀: W ← W₀ + keep · (W − W₀) + A Vᵀ.
        """
        if self._unchanged:
            return
        self._weight.add_product(*self.factors(self.core), *self.updated_at, keep=self.keep)
        self._clear()

    @tagged("directions")
    def pending_factors(self) -> tuple[Tensor | None, Tensor | None]:
        """(left, right) of the product that the next fold adds, None for nothing."""
        if not self.pending:
            return None, None
        left, right = self.factors(self.core)
        return left.clone(), right.contiguous()

    @tagged("directions")
    def merged(self) -> Tensor:
        """A copy of W as :meth:`fold` would leave it; the same tensor for every owner of a shared weight."""
        if self._unchanged:
            return placement.snapshot(self.parameter)
        merged = None if self._merged is None else self._merged()
        if merged is not None:
            return merged
        with placement.loaded(self.parameter):
            merged = self.parameter.detach().clone()
        copy = full_coordinate(self.name, nn.Parameter(merged, requires_grad=False), keep_residual=False)
        if self.anchored:
            copy.set_anchor(self.anchor)
        copy.add_product(*self.factors(self.core), *self.updated_at, keep=self.keep)
        self._merged = weakref.ref(merged)
        return merged

    def _clear(self) -> None:
        self.core.zero_()
        self.pending, self.keep, self._merged = False, 1.0, None

    # -- state ------------------------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self._clear()
        self._weight.reset()

    @tagged("directions")
    def state(self) -> dict[str, Tensor]:
        layer = quantized_linear.owner_of(self.parameter)
        stored = {} if layer is None else {"left": layer.left, "right": layer.right, "factor": layer.factor}
        if self._unchanged:
            return self._weight.state() | stored
        # The model's state dict holds the merged weights, from which W cannot be recovered exactly: it is saved too.
        return {
            "a": unshared(self.core),
            **({"base": placement.snapshot(self.parameter)} if layer is None else stored),
            "keep": torch.tensor(self.keep, dtype=torch.float64),
            "clock": torch.tensor(self.updated_at[1]),
        }

    @tagged("directions")
    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        self.reset()
        if step:
            self.redraw(seed, self._redraws(step - 1))
        if "residual" in state:
            self._weight.load_state(state, seed, step)
        layer = quantized_linear.owner_of(self.parameter)
        if layer is not None:
            layer.left, layer.right, layer.factor = (state[name].to(self.device, copy=True) for name in ("left", "right", "factor"))
        if "a" in state:
            self.core.copy_(matching(state["a"], self.core, self.name))
            if layer is None:
                self._load_weight(state["base"])
            self.pending, self.keep, self.updated_at = True, float(state["keep"]), (seed, int(state["clock"]))

    def _load_weight(self, base: Tensor) -> None:
        work = lambda: self.parameter.data.copy_(matching(base, self.parameter, self.name))  # noqa: E731
        placement.when_loaded(self.parameter, work, base.numel() * base.element_size())


@dataclass(frozen=True)
class LowRank(Subspace):
    """Matrices are trained as W + A Vᵀ (LOZO, 2410.07698), vectors (bias, norm) in full space.

    Experts' weights (E, m, n) are E matrices with factors of their own, a convolution's kernel is one matrix (see ``matrix_view``).

    Args:
        rank: columns r of A (m, r) and V (n, r).
        interval: steps between two redraws of V (ν in the paper).
        layer_scales: measure a scale for each layer's directions (see ``layer_scales``).

    Raises:
        ValueError: rank or interval is below 1.
    """

    rank: int = 2
    interval: int = 50
    layer_scales: bool = False

    full = False
    kind: ClassVar[type[LowRankCoordinate]] = LowRankCoordinate

    def __post_init__(self) -> None:
        for field in ("rank", "interval"):
            at_least_one(field, getattr(self, field))

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        fits = self.fits(parameter.shape) is not None and (parameter.dim() == 2 or not is_sharded(parameter))
        return self.factored(name, parameter) if fits else full_coordinate(name, parameter)

    def fits(self, shape: Sequence[int]) -> MatrixView | None:
        """The matrices of a parameter of this shape that are trained in a low-rank subspace."""
        view = matrix_view(shape)
        return view if view is not None and min(view.rows, view.columns) > self.rank else None

    def factored(self, name: str, parameter: nn.Parameter) -> LowRankCoordinate:
        return self.kind(name, parameter, self.rank, self.interval)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        view = self.fits(shape)
        if view is None:
            return math.prod(shape), 0
        moving, beside = self.factored_elements(view.rows, view.columns)
        return view.number * moving, view.number * beside

    def factored_elements(self, rows: int, columns: int) -> tuple[int, int]:
        """:meth:`elements` of one matrix."""
        return rows * self.rank, (rows + columns) * self.rank

    def memory(self, update_rule_state: float) -> str:
        return "Σ r·(m + n)" + times(update_rule_state, "r·m")


def times(count: float, term: str) -> str:
    """The suffix of a formula for ``count`` times ``term``; empty for 0."""
    return f" + {term}" if count == 1 else f" + {count:g}·{term}" if count else ""
