"""What comes before a step's evaluations: what the subspace has to see, redraws, and what is measured now and then.

The functions behind ``ZerothOrder.step``; they know the optimiser from inside. What they find out they say in its journal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune import applying, following, layer_scales, observing
from zotune.coordinates import Coordinate, Offset
from zotune.directions import Key
from zotune.guidance import Told
from zotune.loss_values import LossFunction
from zotune.probe import isolated_generators
from zotune.stacking import batch_rows, take

if TYPE_CHECKING:
    from zotune.optimizer import ZerothOrder

#: ε that side paths are looked at with where none is known yet.
EPS = 1e-3


def ready(optimizer: ZerothOrder, loss_fn: LossFunction, parts: list[Any] | None, step: int) -> None:
    """Everything that is due before step number ``step``."""
    guidance, fresh = optimizer.guidance, optimizer._begun != step
    observe(optimizer, loss_fn, parts, step)
    applying.begin(optimizer, step)
    turns = fresh and (not step or optimizer.method.subspace.observes(step))
    if guidance is not None and turns:
        guidance.turned()
        if not guidance.on and optimizer.calibrator is not None:
            optimizer.calibrator.step_size.waited = guidance.waited
    guided = optimizer.guided
    if optimizer.calibrator is not None and math.isnan(optimizer.eps) and not guided:
        _choose_eps(optimizer, optimizer.evaluations.function(loss_fn, parts), step)
    if not optimizer._prepared:
        _prepare(optimizer, optimizer.evaluations.trial(loss_fn, parts), step)
    if guided:
        return
    if optimizer.layers and _scales_due(optimizer, step, turns):
        _scale_layers(optimizer, loss_fn, parts, step)
    if optimizer.calibrator is not None:
        _measure(optimizer, loss_fn, parts, step)
    elif guidance is not None:
        _measured(optimizer, {}, 0, 0, step)


def observe(optimizer: ZerothOrder, loss_fn: LossFunction, parts: list[Any] | None, step: int) -> None:
    """Let the subspace look at the step's data, where it has to."""
    subspace, guidance = optimizer.method.subspace, optimizer.guidance
    if optimizer._begun == step or not subspace.observes(step):
        return
    if guidance is not None:
        plain = optimizer.calibrator.step_size if optimizer.calibrator is not None and guidance.measured else None
        if not guidance.next(plain, optimizer.method.forwards(step)):
            return
    wanted, whole = subspace.looks_at(step), True
    if wanted and optimizer.examples is not None and parts is not None:
        parts, whole = optimizer.examples(step, wanted), False
    forwards = counted = 0
    common = Key(optimizer.seed, step, 0, "", "loss")
    probe = optimizer.probe

    def losses(offset: Offset | None = None, moved: Mapping[str, Coordinate] | None = None) -> Iterator[Tensor]:
        nonlocal forwards, counted
        forwards += whole
        for call in [loss_fn] if parts is None else [partial(loss_fn, part) for part in parts]:
            forwards += not whole
            found = torch.as_tensor(call() if offset is None else at(offset, moved or {}, call))
            counted += found.numel()
            yield found

    def at(offset: Offset, moved: Mapping[str, Coordinate], call: Callable[[], Any]) -> Any:
        with probe.instead(moved), probe.at(offset, only=moved), isolated_generators(common, probe.devices):
            return call()

    def look() -> dict[str, Tensor]:
        with isolated_generators(common, probe.devices):
            return subspace.observe(optimizer.model, probe.coordinates, losses, optimizer.seed, step)

    if optimizer.workers.several:
        # Where it came from does not matter, as long as it is the same to the last bit: one worker looks for all.
        told = optimizer.workers.from_first(lambda: [list(observing.events(step, probe.evaluate(look, None))), forwards, counted])
        events, forwards, counted = told
        gathered = observing.Gathered()
        found = {name: tensor for event in events for name, tensor in gathered.add(event).items()}
    else:
        found = probe.evaluate(look, None)
        events = [] if optimizer.journal is None else list(observing.events(step, found))
    optimizer.forward_passes += forwards
    optimizer.sequences_evaluated += counted
    for place, event in enumerate(events):
        _say(optimizer, event | (_cost(forwards, counted) if place == 0 else {}))
    applying.tell(optimizer, found)


def _prepare(optimizer: ZerothOrder, evaluate: Callable[[], Tensor], step: int) -> None:
    eps = EPS if math.isnan(optimizer.eps) else optimizer.eps
    distrusted = optimizer.probe.prepare(evaluate, Offset(eps, optimizer.seed, step, 0))
    if optimizer.workers.several:
        distrusted = sorted({name for names in optimizer.workers.exchange(distrusted) for name in names})
        optimizer.probe.distrust(distrusted)
    optimizer._prepared = True
    if distrusted:
        _say(optimizer, {"event": "general_path", "names": distrusted})


def _choose_eps(optimizer: ZerothOrder, evaluate: Callable[[], Tensor], step: int) -> None:
    calibrator = optimizer.calibrator
    assert calibrator is not None
    optimizer.eps = optimizer.evaluations.eps = calibrator.eps(evaluate, optimizer.seed, step)
    optimizer.forward_passes += calibrator.forwards
    optimizer.sequences_evaluated += calibrator.sequences
    _say(optimizer, {"event": "eps", "value": optimizer.eps, **_cost(calibrator.forwards, calibrator.sequences)})


def _measure(optimizer: ZerothOrder, loss_fn: LossFunction, parts: list[Any] | None, step: int) -> None:
    calibrator, evaluations = optimizer.calibrator, optimizer.evaluations
    assert calibrator is not None
    around = partial(evaluations.around, loss_fn, parts, optimizer.seed) if optimizer.method.own else None

    def evaluate() -> Tensor:
        return evaluations.function(loss_fn, parts)()

    calibrator.measure(evaluate, around, optimizer.eps, optimizer.seed, step)
    _measured(optimizer, calibrator.step_size.summary(), calibrator.forwards, calibrator.sequences, step)


def measure_guided(optimizer: ZerothOrder, told: Told, evaluate: Callable[[], Tensor], step: int) -> None:
    """Measure along what a guided step has been told, where that is due."""
    guidance = optimizer.guidance
    assert guidance is not None
    guidance.measure(told, evaluate, optimizer.seed, step)
    _measured(optimizer, guidance.summary(), guidance.forwards, guidance.sequences, step)


def _measured(optimizer: ZerothOrder, found: Mapping[str, float], forwards: int, sequences: int, step: int) -> None:
    """Count and write down what a measurement took and gave, and all that is known every so often, for a run to go on from."""
    optimizer.forward_passes += forwards
    optimizer.sequences_evaluated += sequences
    kept = step % following.KEPT == 0
    if not (forwards or (kept and optimizer.guidance is not None)):
        return
    event: dict[str, Any] = {"event": "measured", **{name: float(f"{number:.6g}") for name, number in found.items()}}
    event |= _cost(forwards, sequences)
    if kept and optimizer.calibrator is not None:
        event["state"] = optimizer.calibrator.state()
    if kept and optimizer.guidance is not None:
        event["guidance"] = optimizer.guidance.state()
    _say(optimizer, event)


def _scales_due(optimizer: ZerothOrder, step: int, turns: bool) -> bool:
    """Whether layers' scales are to be measured: at redraws number 0, 1, 4, 16, ... of LOZO's; ``turns``: whether a turn begins."""
    interval = getattr(optimizer.method.subspace, "interval", 1)
    if optimizer.guidance is not None:
        return turns and layer_scales.due((optimizer.guidance.others - 1) * interval, interval)
    return layer_scales.due(step, interval)


def _scale_layers(optimizer: ZerothOrder, loss_fn: LossFunction, parts: list[Any] | None, step: int) -> None:
    before = optimizer.forward_passes, optimizer.sequences_evaluated
    few = None if parts is None else _few(optimizer, parts[0])

    def coefficients(draw: int) -> Tensor:
        losses = optimizer._gather(loss_fn, few, layer_scales.STEP + step * layer_scales.SAMPLES + draw)
        optimizer.forward_passes += optimizer.method.forwards_per_step
        optimizer.sequences_evaluated += losses.evaluated
        return losses.estimate(optimizer.estimator, optimizer.eps).coefficients

    if optimizer.evaluations.undecided:
        coefficients(0)  # finds out how this model can be evaluated, while all of it is perturbed
    found = layer_scales.measure(optimizer.layers, coefficients)
    optimizer.probe.forget_directions()
    if found is None:
        return
    event: dict[str, Any] = {"event": "scales", "values": found}
    event |= _cost(optimizer.forward_passes - before[0], optimizer.sequences_evaluated - before[1])
    _say(optimizer, event)
    applying.take_event(optimizer, event)


def _few(optimizer: ZerothOrder, part: Any) -> list[Any]:
    """The first examples of a micro-batch, as many as make enough coefficients where examples have directions of their own."""
    method = optimizer.method
    rows = batch_rows(part) if method.own else 0
    enough = math.ceil(layer_scales.SAMPLES / method.each) * math.ceil(rows / method.parts(rows)) if rows else 0
    if enough >= rows or method.parts(enough) >= method.parts(rows):
        return [part]
    return [take(part, torch.arange(enough), rows)]


def _say(optimizer: ZerothOrder, event: dict[str, Any]) -> None:
    if optimizer.journal is not None:
        optimizer.journal.append(event)


def _cost(forwards: int, sequences: int) -> dict[str, int]:
    """What an event cost, for a run that follows its journal."""
    return {"forwards": forwards, "sequences": sequences}
