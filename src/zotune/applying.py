"""What a journal's record does to a run: the update of a step, and the events between steps. Replaying a run is nothing else.

The functions behind ``ZerothOrder.apply`` and ``fold``; they know the optimiser from inside, and never see a batch or a loss function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune import residence
from zotune.coordinates import Coordinate
from zotune.fleets import Fleet
from zotune.journal import Record, StepRecord
from zotune.neighbours import Neighbours, together
from zotune.replayed import Past
from zotune.subspaces import CurvedCoordinate, GuidedCoordinate, LowRankCoordinate

if TYPE_CHECKING:
    from zotune.optimizer import ZerothOrder

#: What is updated at once: a coordinate, or several as one.
Company = Coordinate | Neighbours | Fleet


def take(optimizer: ZerothOrder, record: Record) -> None:
    """See :meth:`ZerothOrder.apply`."""
    if isinstance(record, dict):
        take_event(optimizer, record)
        return
    if record.step != optimizer.steps or len(record.lrs) != len(optimizer.param_groups):
        raise ValueError(f"the record of step {record.step} does not follow step {optimizer.steps - 1} of this run.")
    if optimizer.evaluations.undecided:  # a run's step without an event that says otherwise
        optimizer.evaluations.restore(True, True)
    begin(optimizer, record.step)
    optimizer.steps += 1
    k = len(record.coefficients) // (2 if optimizer.method.estimator == "curvature" else 1)  # curvatures stand behind the coefficients
    terms, factor = [Past(record.step, record.coefficients[:k])], 1.0
    if optimizer.anchor is not None:
        terms, factor = optimizer.anchor.take(terms[0], all(record.skipped), optimizer.probe.coordinates)
    optimizer._terms = ()
    if all(record.skipped):  # nothing was learnt, so nothing moves, momentum included
        optimizer._nonfinite_in_a_row += 1
        optimizer.probe.forget_directions()
        return
    optimizer._nonfinite_in_a_row = 0
    if optimizer.guided:
        _take_told(optimizer, record)
        return
    if optimizer.method.shaping is not None:
        shaped = optimizer.method.shaping.shape(record.coefficients, record.skipped, optimizer.eps, optimizer.shaping_state)
        terms = [Past(record.step, tuple(shaped))]
    if optimizer.method.replayed is not None:
        optimizer.past = [*optimizer.past, *terms][-optimizer.method.replayed.history :]
    optimizer._terms = tuple(terms)
    for place, term in enumerate(terms):
        for group, coordinates, lr in zip(optimizer.param_groups, optimizer.coordinates, record.lrs, strict=True):
            weight_decay = 0.0 if place else float(group["weight_decay"])
            at_once = optimizer.rule.plain and optimizer.method.replayed is None
            for coordinate in _companies(optimizer, coordinates) if at_once else coordinates:
                _update(optimizer, coordinate, term.step, term.coefficients, factor * lr, weight_decay)
                if isinstance(coordinate, CurvedCoordinate):
                    coordinate.learn(optimizer.directions, record.coefficients[k:], optimizer.seed, record.step)
    if not terms:
        optimizer.probe.forget_directions()


def _take_told(optimizer: ZerothOrder, record: StepRecord) -> None:
    """The step of a guided turn: coefficients are the derivatives along the numbers of S, layer by layer; nothing else moves."""
    assert optimizer.guidance is not None
    told = {id(coordinate): part for coordinate, part in optimizer.guidance.parts(torch.tensor(record.coefficients))}
    for group, coordinates, lr in zip(optimizer.param_groups, optimizer.coordinates, record.lrs, strict=True):
        keep = 1 - lr * float(group["weight_decay"])
        for coordinate in coordinates:
            coordinate.drop()
            coordinate.decay(keep)
            if isinstance(coordinate, GuidedCoordinate) and coordinate.guided:
                value = coordinate.value()
                value = optimizer.rule.update(coordinate.name, value, coordinate.of_guide(told[id(coordinate)]), lr, 0.0)
                coordinate.assign(value, optimizer.seed, record.step)


def _companies(optimizer: ZerothOrder, coordinates: list[Coordinate]) -> list[Company]:
    """A group's coordinates, those that are updated together as one; found once."""
    found = optimizer._companies.get(id(coordinates))
    if found is None:
        found = optimizer._companies[id(coordinates)] = list(together(coordinates))
    return found


def _update(optimizer: ZerothOrder, coordinate: Company, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> None:
    """Move a coordinate, where it is a weight that is away as soon as that is back."""
    work = partial(_move, optimizer, coordinate, step, coefficients, lr, weight_decay, optimizer.past)
    if isinstance(coordinate, Coordinate) and not isinstance(coordinate, LowRankCoordinate):
        residence.when_at_hand(coordinate.parameter, work)
    else:
        work()


def _move(
    optimizer: ZerothOrder,
    coordinate: Company,
    step: int,
    coefficients: Sequence[float],
    lr: float,
    weight_decay: float,
    past: Sequence[Past],
) -> None:
    k = len(coefficients)
    rate = lr * coordinate.lr_scale
    if isinstance(coordinate, Coordinate) and coordinate.turn is not None:
        turns = [coordinate.moves(step, direction) for direction in range(k)]
        if not any(turns):
            coordinate.drop()
            return
        coefficients = [c if turn else 0.0 for c, turn in zip(coefficients, turns, strict=True)]
    if optimizer.method.replayed is not None:
        assert isinstance(coordinate, Coordinate)
        coordinate.drop()
        value = coordinate.value()
        if weight_decay:
            value.mul_(1 - lr * weight_decay)
        optimizer.method.replayed.move(coordinate, value, past, rate, optimizer.directions, optimizer.seed)
        coordinate.assign(value, optimizer.seed, step)
        return
    if optimizer.rule.plain:
        weights = [-rate * (c / k) for c in coefficients]
        coordinate.descend(optimizer.directions, weights, 1 - lr * weight_decay, optimizer.seed, step)
        coordinate.drop()
        return
    assert isinstance(coordinate, Coordinate)
    value = coordinate.value()
    weights = [c / k for c in coefficients]
    estimate = coordinate.weighted(optimizer.directions, weights, optimizer.seed, step).to(value.dtype)
    coordinate.drop()
    if weight_decay and not coordinate.decays_weights:
        coordinate.decay(1 - lr * weight_decay)
        weight_decay = 0.0
    value = optimizer.rule.update(coordinate.name, value, estimate, rate, weight_decay)
    coordinate.assign(value, optimizer.seed, step)


def take_event(optimizer: ZerothOrder, event: Mapping[str, Any]) -> None:
    """What happened between two steps.

    Raises:
        ValueError: another version wrote an event that this one does not know.
    """
    if event.get("event") == "fold":
        fold(optimizer)
    elif event.get("event") == "eps":
        optimizer.eps = optimizer.evaluations.eps = float(event["value"])
    elif event.get("event") == "observed":
        tell(optimizer, optimizer._gathered.add(event))
    elif event.get("event") == "scales":
        begin(optimizer, optimizer.steps)
        for layer, scale in zip(optimizer.layers, event["values"], strict=True):
            for coordinate in layer:
                optimizer.rule.transport(coordinate.name, coordinate.rescale(float(scale), optimizer.seed, optimizer.steps))
    elif event.get("event") == "measured":
        pass  # what came of it is in the steps' learning rates
    elif event.get("event") == "probe":
        optimizer.evaluations.restore(event["batched"], event.get("apart", False))
    elif event.get("event") == "general_path":
        optimizer.probe.distrust(event["names"])
        optimizer._prepared = True
    else:
        raise ValueError(f"this version of zotune does not know the journal event {event.get('event')!r}.")


def begin(optimizer: ZerothOrder, step: int) -> None:
    """Ready every coordinate for a step, once: redraws, and moments carried across them."""
    if optimizer._begun == step:
        return
    for group in optimizer.coordinates:
        for coordinate in group:
            carry = coordinate.begin_step(optimizer.seed, step)
            if carry is not None:
                optimizer.rule.transport(coordinate.name, carry)
    optimizer._begun = step


def fold(optimizer: ZerothOrder) -> None:
    """Write pending low-rank updates into the weights."""
    for group in optimizer.coordinates:
        for coordinate in group:
            if isinstance(coordinate, LowRankCoordinate):
                coordinate.fold()


def tell(optimizer: ZerothOrder, observed: Mapping[str, Tensor]) -> None:
    """Hand coordinates what the subspace has seen of them, for their next redraw."""
    for coordinate in optimizer.probe.coordinates:
        if coordinate.name in observed:
            coordinate.observed = observed[coordinate.name]
