"""Guided low rank: phases in LOZO's subspace alternate with phases in a subspace of the output gradients (LOZO-G)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives.head_weight import head_weight
from zotune.objectives.output_gradients import OutputGradientRecorder, recording
from zotune.rng.directions import Directions
from zotune.subspaces import residual_check
from zotune.subspaces.activation import ActivationCoordinate, observing_inputs
from zotune.subspaces.base import Losses, at_least_one
from zotune.subspaces.coordinate import Coordinate, MomentTransport
from zotune.subspaces.guided_projection import CompressedRows, compress, decompress, fit_projection, polar
from zotune.subspaces.low_rank import LowRank, LowRankCoordinate, times
from zotune.weights.layouts import is_outputs_first, residual_width
from zotune.weights.structure import body_of, decoder_of, head_of, last_block, trained_layers

#: Scored positions whose output gradients make a subspace, at most: every position of a text may be scored.
MAX_POSITIONS = 256
#: Examples that a phase trains on for each one that it observes.
TRAINED_PER_OBSERVED = 3.75


class GuidedCoordinate(ActivationCoordinate):
    """θ (m, r) of W + E(θ) Vᵀ: E(θ) = θ in a LOZO phase, E(θ) = P S in a guided phase.

    S (q, q) is the first q² elements of θ: W is trained as W + P S Vᵀ. P and V are orthonormal; the one on the layer's output side spans
    output gradients, the other combinations of its inputs. Both are compressed to eight bits, as the journal stores them.

    Attributes:
        fixed_direction: a direction in S, (q²,), for evaluations instead of a drawn one.
        momentum: β of M; None: steps go along the derivatives in S.
        moment: M (q, q), the running mean of the derivatives in S, carried from one guided phase to the next.
        writes: whether the layer was found to write to the residual stream; None before the run's check (``residual_check``).
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, rank: int, interval: int, guide: int, begin: int, momentum: float | None = None
    ) -> None:
        super().__init__(name, parameter, rank, interval)
        self.begin = begin  # intervals to the first redraw
        self.momentum = momentum
        self.moment = torch.zeros(guide, guide)  # on the host, where derivatives are
        rows, columns = parameter.shape
        self.p = torch.zeros(rows, guide, device=parameter.device)
        self._v_buffer = torch.zeros(max(rank, guide), columns, device=parameter.device).T  # V is its first r or q columns
        self.v = self._v_buffer[:, :rank]
        self.guided = False
        self.fixed_direction: Tensor | None = None
        self.writes: bool | None = None
        self._told: tuple[tuple[Tensor, Tensor, int], Tensor] | None = None  # Ĝ, M and its version, and polar(M) after the step

    @property
    def num_guided(self) -> int:
        """Elements trained in a guided phase, q²."""
        return self.p.shape[1] ** 2

    @tagged("directions")
    def expand(self, core: Tensor) -> Tensor:
        if not self.guided:
            return core
        q = self.p.shape[1]
        return self.p @ core.flatten(-2)[..., : q * q].unflatten(-1, (q, q))

    @tagged("directions")
    def expand_guided(self, elements: Tensor) -> Tensor:
        """θ (m, r) of the elements of S, (q²,)."""
        theta = torch.zeros(self.numel, device=self.device)
        theta[: self.num_guided] = elements.to(self.device)
        return theta.view(self.shape)

    @tagged("directions")
    def averaged(self, derivatives: Tensor) -> Tensor:
        """M after a step of the derivatives Ĝ (q²,): β M + (1 − β) Ĝ, (q, q)."""
        assert self.momentum is not None, self.name
        return torch.lerp(derivatives.view_as(self.moment).to(self.moment), self.moment, self.momentum)

    @tagged("directions")
    def advance(self, derivatives: Tensor) -> None:
        """Take a step's derivatives (q²,) into the running mean, unless they are 0, as those of a phase that does not lower the loss."""
        if self.momentum is not None and bool(derivatives.any()):
            self.moment = self.averaged(derivatives)

    @tagged("directions")
    def step_direction(self, derivatives: Tensor) -> Tensor:
        """What a step of the derivatives Ĝ (q²,) goes along, (q²,): polar(M) of M after the step; Ĝ without momentum or where it is 0.

        A step asks twice, for its rate and for its update: the singular values are computed once.
        """
        if self.momentum is None or not bool(derivatives.any()):
            return derivatives
        moment = self.moment
        if self._told is not None:
            (known, of, version), direction = self._told
            if of is moment and version == moment._version and known.dtype == derivatives.dtype and torch.equal(known, derivatives):
                return direction
        direction = polar(self.averaged(derivatives)).flatten()
        self._told = (derivatives.clone(), moment, moment._version), direction
        return direction

    @tagged("directions")
    def draw(self, directions: Directions, seed: int, step: int, first: int, count: int, alone: bool = False) -> Tensor:
        if self.fixed_direction is None:
            return super().draw(directions, seed, step, first, count, alone)
        assert count == 1, count
        return self.expand_guided(self.fixed_direction).unsqueeze(0)

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        observed, was_guided, self.guided = self.observed, self.guided, False
        before = self.v.clone() if was_guided and observed is not None else None
        self.v = self._v_buffer[:, : self.rank].zero_()  # q may differ from r
        if observed is None:
            transport = super().redraw(seed, redraw)
            self.v = self._v_buffer[:, : self.rank].copy_(self.v)
        else:
            self.observed, self.from_data, self.guided = None, True, True
            p, v = decompress(observed.to(self.device), self.parameter.shape)
            if before is None:
                self.moment.zero_()
            else:  # that of the gradient P M Vᵀ within the new sides
                self.moment = ((p.T @ self.p) @ self.moment.to(p) @ (before.T @ v)).cpu()
            self.p.copy_(p)
            self.v = self._v_buffer[:, : self.p.shape[1]].copy_(v)
            transport = None
        return torch.zeros_like if was_guided or self.guided else transport  # the two subspaces are unrelated

    @tagged("directions")
    def begin_step(self, seed: int, step: int) -> MomentTransport | None:
        return None if 0 < step < self.begin * self.interval else super().begin_step(seed, step)

    def _redraws(self, step: int) -> int:
        return max(0, step // self.interval - self.begin + 1)

    def kept(self) -> list[Tensor]:
        return [self._v_buffer if kept is self.v else kept for kept in super().kept()] + [self.p]

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        if self.guided:
            state["v"] = compress([self.p, self.v])
            state["moment"] = self.moment.clone()
        return state

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        super().load_state(state, seed, step)
        if self.guided:
            self.moment = state["moment"].cpu().clone()


@dataclass(frozen=True)
class Guided(LowRank):
    """Two kinds of phases: LOZO's, as in ``LowRank``, and guided ones that train the layers writing to the residual stream.

    δ_i (d,) is the gradient of the loss of scored position i in the last hidden state, which a forward pass gives (``output_gradients``),
    and x_i (n,) a layer's input there. A layer y = W x that writes to the residual stream has the gradient Σ_i δ_i x_iᵀ approximately: the
    last layer up to a factor of each position, the others as feedback alignment. With the ridge regression δ̂ = B x of δ on x,

        P = the leading right singular vectors of the fitted δ̂ (N, d),   V = an orthonormal basis of Bᵀ P.

    A guided phase trains W + P S Vᵀ; one forward pass a step gives the derivatives in S, Ĝ = Σ_i (Pᵀδ_i)(Vᵀx_i)ᵀ. With plain SGD as the
    update rule

        M ← β M + (1 − β) Ĝ,   S ← S − η polar(M),   polar(U Σ Wᵀ) = U Wᵀ

    (as in Muon, 2502.16982), so that the sizes of what feedback predicts, which it knows least of, do not matter. Another rule is given α
    Ĝ, α the measured slope over that of Ĝ. ``output_gradient_steps`` chooses the next phase. Without output gradients (a custom loss, a
    model without a head) every phase is LOZO's, and so it is where the loss returned is not a multiple of the recorded one, or the logits
    not one of the head's output. Which layers write to the stream is checked once a run.

    Args:
        rank: r of LOZO's phases.
        interval: steps of a phase.
        layer_scales: as in ``LowRank``, measured in LOZO's phases.
        guide: q, rank of a guided phase.
        begin: LOZO phases before the first guided one.
        examples: examples observed before a guided phase, where so many are available.
        momentum: β.

    Raises:
        ValueError: a number is below 1, ``begin`` below 0, or ``momentum`` outside [0, 1).
    """

    guide: int = 3
    begin: int = 0
    examples: int = 128
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guide", "examples"):
            at_least_one(name, getattr(self, name))
        if not isinstance(self.begin, int) or self.begin < 0:
            raise ValueError(f"begin must be a whole number of at least 0, not {self.begin!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum!r}.")

    def interval_for(self, batch: int) -> int:
        """Steps of ``batch`` examples in a phase, at least, so that observing takes a fifth of the sequences or less."""
        return max(self.interval, math.ceil(TRAINED_PER_OBSERVED * self.examples / batch))

    def factored(self, name: str, parameter: nn.Parameter) -> LowRankCoordinate:
        if parameter.dim() != 2:  # no layer's matrix
            return LowRankCoordinate(name, parameter, self.rank, self.interval)
        return GuidedCoordinate(name, parameter, self.rank, self.interval, self.guide, self.begin, self.momentum)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        return super().elements(shape) if len(shape) == 2 else LowRank(self.rank).elements(shape)

    def factored_elements(self, rows: int, columns: int) -> tuple[int, int]:
        return rows * self.rank, rows * (self.rank + self.guide) + columns * max(self.rank, self.guide)

    def memory(self, update_rule_state: float) -> str:
        return "Σ r·m + q·(m + n)" + times(update_rule_state, "r·m")

    def sample_size(self, step: int) -> int:
        return self.examples if self.needs_data(step) else 0

    def needs_data(self, step: int) -> bool:
        return step >= self.begin * self.interval and step % self.interval == 0

    @tagged("directions")
    def observe(self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Losses, seed: int, step: int) -> dict[str, Tensor]:
        """P and V of every guided layer, compressed, (2 + m + n, q) int8, by name; empty for a LOZO phase."""
        guided = [c for c in coordinates if isinstance(c, GuidedCoordinate)]
        head, wanted = head_of(model), {id(c.parameter): c for c in guided if c.writes is not False}
        layers = {layer: c for layer, c in trained_layers(model, wanted).items() if layer is not head}
        weight, body, decoder = head_weight(head), body_of(model), decoder_of(model)
        width = 0 if weight is None else weight.shape[1]
        within = decoder if body is None else body
        if within is not None:
            inside = set(within.modules())
            layers = {layer: coordinate for layer, coordinate in layers.items() if layer in inside}
        headless = head is None and last_block(model) is not None  # a classifier, or a body whose states are pooled
        # in front of a masked language model's head δ may have another width than the head's input
        if body is None and not headless and not any(residual_width(layer) == width for layer in layers):
            return {}
        with recording(MAX_POSITIONS) as recorder:
            inputs = _LayerInputs(recorder, layers)
            with observing_inputs(layers, inputs.observe):
                fault = _follow(recorder, losses)
        found: dict[str, Tensor] = {}
        if not recorder.gradients:
            return found
        gradients = torch.cat(recorder.gradients).cpu()
        fitting: dict[nn.Module, GuidedCoordinate] = {}
        for layer, coordinate in layers.items():
            fits = residual_width(layer) == gradients.shape[1] and coordinate.num_guided <= coordinate.numel
            if fits and inputs.rows(coordinate.name) == len(gradients):
                fitting[layer] = coordinate
            else:
                inputs.drop(coordinate.name)
        if fault is None and any(c.writes is None for c in fitting.values()):
            encoder, named = body is not None or headless, {layer: c.name for layer, c in fitting.items()}
            verdict = residual_check.verify(named, losses, MAX_POSITIONS, seed, step, encoder=encoder)
            if verdict.constant_factors:
                for coordinate in guided:
                    coordinate.writes = coordinate.name not in verdict.rejected
                expected = decoder is not None or encoder  # queries of the cross-attention, layers that norms hide
                if verdict.rejected and not (expected and len(verdict.rejected) < len(fitting)):
                    _say_once(model, f"{len(verdict.rejected)} layers do not write to the residual stream, such as {verdict.rejected[0]}")
            else:
                fault = "the loss returned is the recorded one times a factor that depends on the model"
        if fault is not None:
            _say_once(model, f"output gradients are not used, for {fault}")
            return found
        for layer, coordinate in fitting.items():
            scored, sampled = inputs.take(coordinate.name)
            if coordinate.writes and scored is not None:
                projection = fit_projection(scored, gradients, sampled, self.guide)
                if projection is not None:
                    p, v = projection
                    found[coordinate.name] = compress([p, v] if is_outputs_first(layer) else [v, p])
            del scored, sampled  # before those of the next layer are made
        return found


def _follow(recorder: OutputGradientRecorder, losses: Losses) -> str | None:
    """Evaluate the losses; what keeps their output gradients from being used, if anything does. None too where there are none."""
    calls = losses()
    while True:
        with recorder.following():
            try:
                returned = next(calls)
            except StopIteration:
                return None
            except NotImplementedError as error:  # an operation without a forward derivative
                return f"the loss returned cannot be followed ({' '.join(str(error).split())[:120]})"
            valid = recorder.end_call(returned)
        if not recorder.gradients:  # this loss gives none
            return None
        if recorder.logits_differ:
            return "the logits are not the output of the model's head (a soft cap, for instance)"
        if not bool(valid.all()):
            return "the loss returned is neither the recorded one of zotune.objectives, nor a constant multiple of it for each example"


#: What was said about each model.
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _say_once(model: nn.Module, fact: str) -> None:
    said = _said.setdefault(model, set())
    if fact not in said:
        said.add(fact)
        warnings.warn(f"{fact}; drawn directions train the weights, as in lozo-e.", stacklevel=2)


class _LayerInputs:
    """Inputs of the layers that may write to the residual stream; a layer that shares its input with another does not."""

    def __init__(self, recorder: OutputGradientRecorder, layers: dict[nn.Module, GuidedCoordinate]) -> None:
        self.recorder, self.layers = recorder, layers
        self.scored: dict[str, CompressedRows] = {}
        self.sampled: dict[str, CompressedRows] = {}
        self.shared: set[str] = set()
        self._last: tuple[Any, str] | None = None

    @tagged("directions")
    def observe(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name, states = self.layers[module].name, args[0] if args else None
        if not isinstance(states, Tensor):
            return
        if self._last is not None and self._last[0] is states:
            self.shared |= {name, self._last[1]}
        self._last = states, name
        if name in self.shared or residual_width(module) is None:
            return
        scored, sampled = self.recorder.scored_rows(states), self.recorder.sampled_rows(states)
        if scored is not None and sampled is not None:
            self.scored.setdefault(name, CompressedRows(torch.bfloat16)).add(scored)
            self.sampled.setdefault(name, CompressedRows(torch.float8_e4m3fn)).add(sampled)

    def rows(self, name: str) -> int | None:
        """Scored rows of a layer, None for one that shares its input or has none."""
        scored = self.scored.get(name)
        return None if name in self.shared or scored is None else sum(len(part) for part, _ in scored.parts)

    def drop(self, name: str) -> None:
        self.scored.pop(name, None)
        self.sampled.pop(name, None)

    @tagged("directions")
    def take(self, name: str) -> tuple[Tensor | None, Tensor]:
        """Remove and return a layer's inputs at the scored positions, (N, n), and at a sample of all positions."""
        scored, sampled = self.scored.pop(name, None), self.sampled.pop(name, None)
        if name in self.shared or scored is None or sampled is None:
            return None, torch.empty(0)
        return scored.all(), sampled.all()
