"""A step's estimate and its learning rates, along drawn directions or output gradients."""

from __future__ import annotations

from zotune.forward.losses import Losses
from zotune.methods.estimators import Estimate
from zotune.optim.attribution import Attribution
from zotune.optim.construction import RunParts
from zotune.optim.output_window import WindowTransform
from zotune.optim.preparation import Preparation
from zotune.optim.private_estimate import PrivateEstimate
from zotune.optim.state import StepContext


class StepEstimate:
    """Measures the estimate that the journal records."""

    def __init__(self, run: RunParts, preparation: Preparation, private: PrivateEstimate | None) -> None:
        self.run, self.state, self.preparation, self.private = run, run.state, preparation, private
        self.attribution: Attribution | None = None

    def attribute(self, attribution: Attribution) -> None:
        """Record what examples contribute to the steps; ValueError in a private run."""
        if self.private is not None:
            raise ValueError("the shares of examples stand in the journal, which privacy lets out: leave attribute out of a private run.")
        self.attribution = attribution

    def measure(self, context: StepContext, measured: bool) -> tuple[Estimate, tuple[float, ...]]:
        """(the step's estimate, learning rates); ``measured``: the step's measurements are done already."""
        if self.private is not None:
            return self.private.measure(context)
        if self.run.along_output_gradients:
            return self._along_output_gradients(context, measured)
        window = self.run.transform(WindowTransform)
        found = None if window is None else window.observe(context)
        if window is None or found is None:
            return self._along_drawn_directions(context)
        self.state.count(self.run.method.forwards(context.step), found.evaluated)
        return window.estimate(found, context, self.run.estimator), tuple(self.run.rates())

    def _along_drawn_directions(self, context: StepContext) -> tuple[Estimate, tuple[float, ...]]:
        run, state, at = self.run, self.state, context
        for transform in run.transforms:
            at = transform.evaluated_at(at)
        losses = run.evaluator.evaluate(at)
        state.count(run.method.forwards(context.step), losses.evaluated)
        losses = losses.counted(context.loss_fn)
        run.forward.prefetch(context.seed, at.step + 1)
        estimate = losses.estimate(run.estimator, state.eps)
        rates = self._rates(estimate, losses)
        if self.attribution is not None:
            self.attribution.record(context, losses, rates)
        for transform in run.transforms:
            estimate = transform.before_journal(estimate, losses, context, rates)
        return estimate, rates

    def _rates(self, estimate: Estimate, losses: Losses) -> tuple[float, ...]:
        calibrator, state, rates = self.run.calibrator, self.state, self.run.rates()
        if calibrator is not None and calibrator.chooses_lr:
            calibrator.record(losses, estimate, state.eps)
            k, n = len(estimate.coefficients), losses.values.shape[1]
            found = calibrator.rate(k, n, state.eps, state.steps, self.run.shaping_state)
            calibrator.step_size.expect(max(rates))
            rates = [found * rate for rate in rates]
        return tuple(rates)

    def _along_output_gradients(self, context: StepContext, measured: bool) -> tuple[Estimate, tuple[float, ...]]:
        gradients = self.run.output_gradients
        assert gradients is not None
        found = gradients.derivatives(context)
        self.state.count(1, found.evaluated)
        if not measured:
            self.preparation.measure_output_gradients(found, context)
        estimate, rates = gradients.estimate(found), self.run.rates()
        if gradients.measured:
            factor = gradients.rate(found, estimate, context.step)
            rates = [factor * rate for rate in rates]
        return estimate, tuple(rates)
