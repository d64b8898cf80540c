"""Preparation of a step's evaluations: what the subspace observes, redraws, and measurements where they are due.

The results are recorded in the run's journal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.forward.batches import batch_rows, take_rows
from zotune.forward.losses import may_fail
from zotune.io.memory_tags import tagged
from zotune.optim import journal_events
from zotune.optim.calibration import layer_scales
from zotune.optim.calibration.eps import disagreement
from zotune.optim.construction import RunParts
from zotune.optim.layer_projection import LayerProjections
from zotune.optim.output_gradient_steps import Derivatives
from zotune.optim.state import StepContext
from zotune.optim.update import Updater
from zotune.rng.directions import Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces.coordinate import Coordinate, Offset

#: Steps between two records of the complete state of the measurements; a run resumes from one of them.
STATE_EVERY = 200
#: ε that low-rank hooks are compared with where none is known yet.
EPS = 1e-3
#: Relative distance of coefficients at ε and 2ε beyond which a given ε is warned of.
DISAGREEMENT = 0.25


class Preparation:
    """Does what is due before a step's evaluations."""

    def __init__(self, run: RunParts, updater: Updater) -> None:
        self.run, self.updater, self.state = run, updater, run.state
        self.state_every = STATE_EVERY
        self.warned = False  # that a reward has no output gradients

    def prepare(self, context: StepContext) -> None:
        """Everything that is due before a step."""
        run, state, step = self.run, self.state, context.step
        gradients, calibrator, fresh = run.output_gradients, run.calibrator, state.begun != step
        if fresh:
            self._project(context)
        self.observe(context)
        self.updater.begin(step)
        phase_begins = fresh and (not step or run.method.subspace.needs_data(step))
        if gradients is not None and phase_begins:
            gradients.phase_began()
            if not gradients.active and calibrator is not None:
                calibrator.step_size.waited = gradients.phases
        along_output_gradients = run.along_output_gradients
        if calibrator is not None and math.isnan(state.eps) and not along_output_gradients:
            self._choose_eps(context)
        if not state.prepared:
            self._compare_paths(context)
        if along_output_gradients:
            return
        if run.layers and self._scales_due(step, phase_begins):
            self._scale_layers(context)
        if calibrator is not None:
            self._calibrate(context)
        elif gradients is not None:
            self._measured({}, 0, 0, step)

    def _project(self, context: StepContext) -> None:
        """Search for how far layers are moved, where that is due."""
        projections, state = self.run.transform(LayerProjections), self.state
        if projections is None or not projections.schedule.due(context.step):
            return
        ratios, forwards, sequences = projections.search(context)
        state.count(forwards, sequences)
        event: dict[str, Any] = {"event": "projection", "ratios": ratios, **_cost(forwards, sequences)}
        state.write(event)
        self.updater.apply_event(event)

    def observe(self, context: StepContext) -> None:
        """Let the subspace observe the step's data, where it needs them."""
        run, state, step = self.run, self.state, context.step
        subspace, gradients = run.method.subspace, run.output_gradients
        if state.begun == step or not subspace.needs_data(step):
            return
        if gradients is not None:
            if context.generates:
                if not self.warned:
                    self.warned = True
                    warnings.warn(
                        f"{run.method.name}: a reward has no output gradients; every phase has drawn directions, as in lozo-e.",
                        stacklevel=2,
                    )
                return
            drawn = run.calibrator.step_size if run.calibrator is not None and gradients.measured else None
            if not gradients.choose_phase(drawn, run.method.forwards(step)):
                return
        found, events, forwards, sequences = self._observed(context)
        state.count(forwards, sequences)
        for place, event in enumerate(events):
            state.write(event | (_cost(forwards, sequences) if place == 0 else {}))
        self.updater.observed(found)

    def _observed(self, context: StepContext) -> tuple[dict[str, Tensor], list[dict[str, Any]], int, int]:
        """(what the subspace observes, its journal events, forward passes, sequences evaluated)."""
        run, step, forward = self.run, context.step, self.run.forward
        subspace = run.method.subspace
        loss_fn, parts = context.smooth.loss_fn, context.parts
        wanted, whole = subspace.sample_size(step), True
        if wanted and run.sample_batches is not None and parts is not None:
            parts, whole = run.sample_batches(step, wanted), False
        forwards = counted = 0
        common = Key(context.seed, step, 0, "", "loss")

        def losses(offset: Offset | None = None, moved: Mapping[str, Coordinate] | None = None) -> Iterator[Tensor]:
            nonlocal forwards, counted
            forwards += whole
            for call in [loss_fn] if parts is None else [partial(loss_fn, part) for part in parts]:
                forwards += not whole
                found = torch.as_tensor(call() if offset is None else at(offset, moved or {}, call))
                counted += found.numel()
                yield found

        def at(offset: Offset, moved: Mapping[str, Coordinate], call: Callable[[], Any]) -> Any:
            with (
                forward.replace_coordinates(moved),
                forward.at(offset, only=moved, hooks=False),
                isolated_generators(common, forward.devices),
            ):
                return call()

        def work() -> dict[str, Tensor]:
            with isolated_generators(common, forward.devices):
                return subspace.observe(run.model, forward.coordinates, losses, context.seed, step)

        known = run.output_gradients is None or run.output_gradients.rejected is not None

        def made(found: dict[str, Tensor]) -> list[dict[str, Any]]:
            rejected = None if known or run.output_gradients is None else run.output_gradients.rejected
            checked = [] if rejected is None else [{"event": "residual", "rejected": rejected}]
            return [*checked, *journal_events.events(step, found)]

        if run.workers.several:
            # One worker observes for all, so that all have the same to the last bit.
            first = run.workers.from_first(lambda: [made(forward.evaluate(work, None)), forwards, counted])
            events, forwards, counted = first
            assembler, found = journal_events.TensorAssembler(self.state.assembler.parameters), dict[str, Tensor]()
            for event in events:
                if event["event"] == "residual":
                    self.updater.apply_event(event)
                else:
                    found |= assembler.add(event)
            return found, events, forwards, counted
        found = forward.evaluate(work, None)
        events = [] if self.state.journal is None else made(found)
        return found, events, forwards, counted

    def _compare_paths(self, context: StepContext) -> None:
        """Take the general path for layers whose fast path differs from it; of an engine, which has none, check the given ε."""
        run, state = self.run, self.state
        if run.forward.rounds and not math.isnan(state.eps) and not isinstance(run.method.eps, str):
            self._check_eps(context)
        eps = EPS if math.isnan(state.eps) else state.eps
        differing = run.forward.prepare(run.evaluator.trial(context), Offset(eps, context.seed, context.step, 0))
        if run.workers.several:
            differing = sorted({name for names in run.workers.exchange(differing) for name in names})
            run.forward.disable_hooks(differing)
        state.prepared = True
        if differing:
            state.write({"event": "general_path", "names": differing})

    def _check_eps(self, context: StepContext) -> None:
        """Warn where a given ε is lost in the rounding of an engine, which may quantize activations."""
        run, eps, evaluate = self.run, self.state.eps, self.run.evaluator.function(context)

        def at(scale: float, direction: int) -> Tensor:
            return run.forward.evaluate(evaluate, Offset(scale, context.seed, context.step, direction)).cpu()

        found = disagreement(at, run.estimator, eps)
        rounding = found > DISAGREEMENT and disagreement(at, run.estimator, 2 * eps) < found  # curvature grows with ε, rounding shrinks
        run.forward.drop_directions()
        if rounding:
            warnings.warn(
                f"coefficients at eps={eps:g} and at {2 * eps:g} differ by {100 * found:.0f}%: the engine's rounding is in them. "
                "Set eps='auto', which measures a size at which they agree.",
                stacklevel=2,
            )

    # -- measurements ----------------------------------------------------------------------------------------------------------------

    def _choose_eps(self, context: StepContext) -> None:
        calibrator, state = self.run.calibrator, self.state
        assert calibrator is not None
        state.eps = calibrator.eps(self.run.evaluator.function(context.smooth), context.seed, context.step)
        state.count(calibrator.forwards, calibrator.sequences)
        state.write({"event": "eps", "value": state.eps, **_cost(calibrator.forwards, calibrator.sequences)})

    def _calibrate(self, context: StepContext) -> None:
        calibrator, evaluator = self.run.calibrator, self.run.evaluator
        assert calibrator is not None

        def evaluate() -> Tensor:
            return evaluator.function(context)()

        def around(step: int, scale: float) -> Any:
            return evaluator.around(context.at(step), scale)

        own = around if self.run.method.own else None
        calibrator.measure(evaluate, own, self.state.eps, context.seed, context.step, may_fail=may_fail(context.loss_fn))
        self._measured(calibrator.step_size.summary(), calibrator.forwards, calibrator.sequences, context.step)

    def measure_output_gradients(self, found: Derivatives, context: StepContext) -> None:
        """Measure along output gradients, where that is due."""
        gradients = self.run.output_gradients
        assert gradients is not None
        gradients.measure(found, self.run.evaluator.function(context), context.seed, context.step)
        self._measured(gradients.summary(), gradients.forwards, gradients.sequences, context.step)

    def _measured(self, found: Mapping[str, float], forwards: int, sequences: int, step: int) -> None:
        """Count a measurement and record it; every :attr:`state_every` steps with the complete state, to resume from."""
        run, state = self.run, self.state
        state.count(forwards, sequences)
        complete = step % self.state_every == 0
        unmeasured = run.output_gradients is not None or (run.calibrator is not None and run.calibrator.generates)
        if not (forwards or (complete and unmeasured)):
            return
        event: dict[str, Any] = {"event": "measured", **{name: float(f"{number:.6g}") for name, number in found.items()}}
        event |= _cost(forwards, sequences)
        if complete and run.calibrator is not None:
            event["state"] = run.calibrator.state()
        if complete and run.output_gradients is not None:
            event["output_gradients"] = run.output_gradients.state()
        state.write(event)

    # -- scales of layers ------------------------------------------------------------------------------------------------------------

    def _scales_due(self, step: int, phase_begins: bool) -> bool:
        """Whether layers' scales are measured: at redraws number 0, 1, 4, 16, ... of phases with drawn directions."""
        interval, gradients = getattr(self.run.method.subspace, "interval", 1), self.run.output_gradients
        if gradients is not None:
            return phase_begins and layer_scales.due((gradients.drawn_phases - 1) * interval, interval)
        return layer_scales.due(step, interval)

    def _scale_layers(self, context: StepContext) -> None:
        run, state = self.run, self.state
        before = state.forward_passes, state.sequences_evaluated
        few = replace(context.smooth, parts=None if context.parts is None else self._few(context.parts[0]))

        def coefficients(draw: int) -> Tensor:
            losses = run.evaluator.evaluate(few.at(layer_scales.STEP + context.step * layer_scales.SAMPLES + draw))
            state.count(run.method.forwards_per_step, losses.evaluated)
            return losses.counted(context.loss_fn).estimate(run.estimator, state.eps).coefficients

        if run.evaluator.choice.undecided:
            coefficients(0)  # makes the evaluation choice while the whole model is perturbed
        found = layer_scales.measure(run.layers, coefficients)
        run.forward.drop_directions()
        if found is None:
            return
        event: dict[str, Any] = {"event": "scales", "values": found}
        event |= _cost(state.forward_passes - before[0], state.sequences_evaluated - before[1])
        state.write(event)
        self.updater.apply_event(event)

    @tagged("temporary")
    def _few(self, part: Any) -> list[Any]:
        """The first examples of a micro-batch: enough coefficients where examples have directions of their own."""
        method = self.run.method
        rows = batch_rows(part) if method.own else 0
        enough = math.ceil(layer_scales.SAMPLES / method.num_directions) * math.ceil(rows / method.parts(rows)) if rows else 0
        if enough >= rows or method.parts(enough) >= method.parts(rows):
            return [part]
        return [take_rows(part, torch.arange(enough), rows)]


def _cost(forwards: int, sequences: int) -> dict[str, int]:
    """The cost of an event, for a run that resumes along its journal."""
    return {"forwards": forwards, "sequences": sequences}
