"""A step's estimate and its learning rates, along drawn directions or output gradients."""

from __future__ import annotations

from zotune.forward.losses import Losses
from zotune.methods.estimators import Estimate
from zotune.optim.context import StepContext
from zotune.optim.preparation import Preparation
from zotune.optim.run_parts import RunParts


class DrawnEstimate:
    """Losses along drawn directions, made to coefficients and transformed."""

    def __init__(self, run: RunParts) -> None:
        self.run, self.state = run, run.state

    def measure(self, context: StepContext) -> tuple[Estimate, tuple[float, ...]]:
        """(the step's estimate as the journal is to hold it, learning rates)."""
        run, state = self.run, self.state
        at = context if run.anchor is None else context.at(run.anchor.anchoring.key_step(context.step))
        losses = run.evaluator.evaluate(at)
        state.count(run.method.forwards(context.step), losses.evaluated)
        run.forward.foresee(context.seed, at.step + 1)
        estimate = losses.estimate(run.estimator, state.eps)
        rates = self._rates(estimate, losses)
        for transform in run.transforms:
            estimate = transform.measured(estimate, losses, context, rates)
        return estimate, rates

    def _rates(self, estimate: Estimate, losses: Losses) -> tuple[float, ...]:
        calibrator, state, rates = self.run.calibrator, self.state, self.run.rates()
        if calibrator is not None and calibrator.chooses_lr:
            calibrator.tell(losses, estimate, state.eps)
            k, n = len(estimate.coefficients), losses.values.shape[1]
            found = calibrator.rate(k, n, state.eps, state.steps, state.shaping)
            calibrator.step_size.expect(max(rates))
            rates = [found * rate for rate in rates]
        return tuple(rates)


class GuidedEstimate:
    """Output gradients of one forward pass, made to derivatives along the elements of S."""

    def __init__(self, run: RunParts, preparation: Preparation) -> None:
        self.run, self.preparation = run, preparation

    def measure(self, context: StepContext, measured: bool) -> tuple[Estimate, tuple[float, ...]]:
        """(the step's estimate, learning rates); ``measured``: what is due for them has been."""
        guidance = self.run.guidance
        assert guidance is not None
        told = guidance.told(context)
        self.run.state.count(1, told.evaluated)
        if not measured:
            self.preparation.measure_guided(told, context)
        estimate, rates = guidance.estimate(told), self.run.rates()
        if guidance.measured:
            found = guidance.rate(told, estimate, context.step)
            rates = [found * rate for rate in rates]
        return estimate, tuple(rates)
