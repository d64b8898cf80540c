"""Guided low rank: LOZO's subspace, and one that the model's output errors point to, take turns (LOZO-G)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions
from zotune.subspaces.activation import ActivationCoordinate, given
from zotune.subspaces.coordinate import Coordinate, MomentTransport
from zotune.subspaces.guided_projection import Rows, guide
from zotune.subspaces.low_rank import LowRank, LowRankCoordinate, at_least_one, times
from zotune.weights.layouts import is_outputs_first, residual_width
from zotune.weights.structure import head_of, trained_layers

#: Scored positions whose output gradients choose a subspace, at most: a text scores all of its own.
MOST_ROWS = 256
#: Examples that a turn's steps see for each that is looked at.
SHARE = 3.75


class OutputGradients(Protocol):
    """What the losses of an evaluation tell of the model's outputs, as ``output_errors.OutputGradientRecorder`` keeps it.

    Attributes:
        errors: the gradient of the loss in the hidden state before the head, at the scored positions, (n, d) in float32 a forward.
    """

    errors: list[Tensor]

    def rows_of(self, states: Tensor) -> Tensor | None:
        """The rows (n, width) of a layer's input at the same positions; None if it has no such rows."""
        ...

    def some_of(self, states: Tensor) -> Tensor | None:
        """The same at some of all positions."""
        ...


class GuidedCoordinate(ActivationCoordinate):
    """θ (m, r) of W + E(θ) Vᵀ: as in LOZO, or *guided* by the output errors, an interval each.

    Guided, E(θ) = P S with S (q, q) the first q² numbers of θ, so that W moves as W + P S Vᵀ: of P and V the one on the side of the layer's
    outputs is orthonormal, and the other its inputs' combinations that tell the errors. P and V are bfloat16 numbers, as the journal
    keeps them.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int, guide: int, begin: int) -> None:
        super().__init__(name, parameter, rank, interval)
        self.begin = begin  # intervals to the first redraw
        rows, columns = parameter.shape
        self.p = torch.zeros(rows, guide, device=parameter.device)
        self._room = torch.zeros(max(rank, guide), columns, device=parameter.device).T  # where V lies, r or q columns of it
        self.v = self._room[:, :rank]
        self.guided = False
        self.fixed_direction: Tensor | None = None  # the direction in S, (q²,), that evaluations go along in place of a drawn one

    @property
    def num_guided(self) -> int:
        """Numbers that move in a guided turn."""
        return self.p.shape[1] ** 2

    @tagged("directions")
    def expand(self, core: Tensor) -> Tensor:
        if not self.guided:
            return core
        q = self.p.shape[1]
        return self.p @ core.flatten(-2)[..., : q * q].unflatten(-1, (q, q))

    @tagged("directions")
    def expand_guided(self, numbers: Tensor) -> Tensor:
        """θ (m, r) of the numbers of S, (q²,)."""
        theta = torch.zeros(self.numel, device=self.device)
        theta[: self.num_guided] = numbers.to(self.device)
        return theta.view(self.shape)

    @tagged("directions")
    def draw(self, directions: Directions, seed: int, step: int, first: int, count: int, alone: bool = False) -> Tensor:
        if self.fixed_direction is None:
            return super().draw(directions, seed, step, first, count, alone)
        assert count == 1, count
        return self.expand_guided(self.fixed_direction).unsqueeze(0)

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        observed, was, self.guided = self.observed, self.guided, False
        self.v = self._room[:, : self.rank].zero_()  # a guide has a rank of its own
        if observed is None:
            carry = super().redraw(seed, redraw)
            self.v = self._room[:, : self.rank].copy_(self.v)
        else:
            self.observed, self.seen, self.guided = None, True, True
            found = observed.to(self.device, torch.float32)
            self.p.copy_(found[: self.shape[0]])
            self.v = self._room[:, : self.p.shape[1]].copy_(found[self.shape[0] :])
            carry = None
        return torch.zeros_like if was or self.guided else carry  # the two subspaces have nothing to do with each other

    @tagged("directions")
    def begin_step(self, seed: int, step: int) -> MomentTransport | None:
        return None if 0 < step < self.begin * self.interval else super().begin_step(seed, step)

    def _redraws(self, step: int) -> int:
        return max(0, step // self.interval - self.begin + 1)

    def kept(self) -> list[Tensor]:
        return [self._room if kept is self.v else kept for kept in super().kept()] + [self.p]

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        if self.guided:
            state["v"] = torch.cat([self.p, self.v]).bfloat16().contiguous()
        return state


@dataclass(frozen=True)
class Guided(LowRank):
    """Matrices move as in ``LowRank`` for an interval, or only those that write to the hidden state, guided by errors: two turns.

    δ_i (d,) is the gradient of scored position i's loss in the hidden state that the head is given, which a forward pass tells (see
    ``output_errors``), and x_i (n,) what a layer is given there. A layer that adds to that state, y = W x, has about the gradient
    Σ_i δ_i x_iᵀ: exactly so, up to what the last norm does, in the last layer, and as if nothing stood between in the others. Its useful
    part is what x can tell of δ: with the ridge regression δ̂ = B x of δ on x,

        P = the leading right singular vectors of the fitted δ̂ (N, d),   V = Bᵀ P, scaled to answer to a text as loudly as in LOZO.

    In a guided turn W moves as W + P S Vᵀ, and one forward pass a step tells the derivatives along the numbers of S, Σ_i (Pᵀδ_i)(Vᵀx_i)ᵀ
    (see ``guidance``). The other turn reaches all weights, whatever the errors can tell of them; who has the next one is ``guidance``'s to
    say. Where no errors are told (a loss of one's own, a model without a head) every turn is LOZO's.

    Args:
        rank: r of LOZO's turns.
        interval: steps of a turn.
        layer_scales: as in ``LowRank``, measured in LOZO's turns.
        guide: q, rank of the guide.
        begin: turns of LOZO's before there may be a guided one.
        examples: how many the errors are taken from at a guided turn, where there are so many to be had.
        watched: watches the losses evaluated in its block, so many scored positions of them at most (``output_errors.watched``).

    Raises:
        ValueError: a number is below 1, or ``begin`` below 0.
    """

    guide: int = 3
    begin: int = 0
    examples: int = 128
    recording: Callable[[int], AbstractContextManager[OutputGradients]] = field(kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guide", "examples"):
            at_least_one(name, getattr(self, name))
        if not isinstance(self.begin, int) or self.begin < 0:
            raise ValueError(f"begin must be a whole number of at least 0, not {self.begin!r}.")

    def interval_for(self, batch: int) -> int:
        """Steps of ``batch`` examples that a turn is to have at least, so that looking takes a fifth of the sequences or less."""
        return max(self.interval, math.ceil(SHARE * self.examples / batch))

    def factored(self, name: str, parameter: nn.Parameter) -> LowRankCoordinate:
        return GuidedCoordinate(name, parameter, self.rank, self.interval, self.guide, self.begin)

    def factored_elements(self, rows: int, columns: int) -> tuple[int, int]:
        return rows * self.rank, rows * (self.rank + self.guide) + columns * max(self.rank, self.guide)

    def memory(self, update_rule_state: float) -> str:
        return "Σ r·m + q·(m + n)" + times(update_rule_state, "r·m")

    def sample_size(self, step: int) -> int:
        return self.examples if self.needs_data(step) else 0

    def needs_data(self, step: int) -> bool:
        return step >= self.begin * self.interval and step % self.interval == 0

    @tagged("directions")
    def observe(
        self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Callable[..., Iterator[Tensor]], seed: int, step: int
    ) -> dict[str, Tensor]:
        """[P; V] (m + n, q) of every layer that is guided, bfloat16, by name; nothing where none is."""
        wanted = {id(c.parameter): c for c in coordinates if isinstance(c, GuidedCoordinate)}
        layers = trained_layers(model, wanted)
        width = getattr(getattr(head_of(model), "weight", None), "shape", (0,))[-1]
        if not any(residual_width(layer) == width for layer in layers):
            return {}
        with self.recording(MOST_ROWS) as recorder:
            writers = _Writers(recorder, layers)
            with given(layers, writers.look):
                for _ in losses():
                    if not recorder.gradients:  # nor will the others tell any
                        break
        found: dict[str, Tensor] = {}
        if not recorder.gradients:
            return found
        errors = torch.cat(recorder.gradients).cpu()
        for layer, coordinate in layers.items():
            inputs, others = writers.take(coordinate.name)
            fits = residual_width(layer) == errors.shape[1] and coordinate.num_guided <= coordinate.numel
            if fits and inputs is not None and len(inputs) == len(errors):
                told = guide(inputs, errors, others, self.guide)
                if told is not None:
                    p, v = told
                    found[coordinate.name] = torch.cat([p, v] if is_outputs_first(layer) else [v, p])
        return found


class _Writers:
    """What the layers are given that may write to the hidden state, which no other layer is given."""

    def __init__(self, recorder: OutputGradients, layers: dict[nn.Module, GuidedCoordinate]) -> None:
        self.recorder, self.layers = recorder, layers
        self.inputs: dict[str, Rows] = {}
        self.others: dict[str, Rows] = {}
        self.shared: set[str] = set()
        self._last: tuple[Any, str] | None = None

    @tagged("directions")
    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name, states = self.layers[module].name, args[0] if args else None
        if not isinstance(states, Tensor):
            return
        if self._last is not None and self._last[0] is states:
            self.shared |= {name, self._last[1]}
        self._last = states, name
        if name in self.shared or residual_width(module) is None:
            return
        scored, others = self.recorder.scored_rows(states), self.recorder.sampled_rows(states)
        if scored is not None and others is not None:
            self.inputs.setdefault(name, Rows(torch.bfloat16)).add(scored)
            self.others.setdefault(name, Rows(torch.float8_e4m3fn)).add(others)

    @tagged("directions")
    def take(self, name: str) -> tuple[Tensor | None, Tensor]:
        """Inputs at the scored positions, (N, n), and at some of all positions, which are not kept any longer."""
        inputs, others = self.inputs.pop(name, None), self.others.pop(name, None)
        if name in self.shared or inputs is None or others is None:
            return None, torch.empty(0)
        return inputs.all(), others.all()
