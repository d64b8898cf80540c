"""What a journal's record does to a run: the update of a step, and the events between steps. Replaying a run is nothing else.

Nothing here sees a batch or a loss function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.methods.history import Past
from zotune.optim.journal import Record, StepRecord
from zotune.optim.run_parts import RunParts
from zotune.optim.step_transforms import Terms
from zotune.optim.update_groups import UpdateGroup, together
from zotune.subspaces import CurvedCoordinate, GuidedCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate
from zotune.weights import placement


class Updater:
    """Applies journal records to the weights of a run."""

    def __init__(self, run: RunParts) -> None:
        self.run, self.state = run, run.state
        self._together: dict[int, list[UpdateGroup]] = {}  # by id of a group's coordinates

    @tagged("update")
    def apply(self, record: Record) -> None:
        """Take the update or the event that a record describes.

        Raises:
            ValueError: the record is not the next one of this run, or another version's.
        """
        if isinstance(record, dict):
            self.apply_event(record)
            return
        run, state = self.run, self.state
        if record.step != state.steps or len(record.lrs) != len(run.param_groups):
            raise ValueError(f"the record of step {record.step} does not follow step {state.steps - 1} of this run.")
        if run.evaluator.undecided:  # a run's step without an event that says otherwise
            run.evaluator.restore(True, True)
        self.begin(record.step)
        state.steps += 1
        k = len(record.coefficients) // (2 if run.method.estimator == "curvature" else 1)  # curvatures stand behind the coefficients
        terms, skipped = Terms((Past(record.step, record.coefficients[:k]),)), all(record.skipped)
        guided = run.guided
        for transform in () if guided else run.transforms:
            terms = transform.applied(terms, record, skipped)
        state.terms = ()
        if skipped:  # nothing was learned, so nothing is updated, momentum included
            state.nonfinite_in_a_row += 1
            run.forward.forget_directions()
            return
        state.nonfinite_in_a_row = 0
        if guided:
            self._apply_guided(record)
            return
        state.terms = terms.terms
        self._apply_terms(terms, record, k)

    def _apply_terms(self, terms: Terms, record: StepRecord, k: int) -> None:
        """The estimates of some steps' directions, one after the other, to the update rule."""
        run = self.run
        at_once = run.rule.plain and run.method.replayed is None
        for place, term in enumerate(terms.terms):
            for group, coordinates, lr in zip(run.param_groups, self.state.coordinates, record.lrs, strict=True):
                weight_decay = 0.0 if place else float(group["weight_decay"])
                for coordinate in self._companies(coordinates) if at_once else coordinates:
                    self._update(coordinate, term.step, term.coefficients, terms.factor * lr, weight_decay)
                    if isinstance(coordinate, CurvedCoordinate):
                        coordinate.learn(run.directions, record.coefficients[k:], self.state.seed, record.step)
        if not terms.terms:
            run.forward.forget_directions()

    def _apply_guided(self, record: StepRecord) -> None:
        """A step along output gradients: coefficients are derivatives along the elements of S, layer by layer; nothing else is trained."""
        run = self.run
        assert run.guidance is not None
        derivatives = {id(coordinate): part for coordinate, part in run.guidance.parts(torch.tensor(record.coefficients))}
        for group, coordinates, lr in zip(run.param_groups, self.state.coordinates, record.lrs, strict=True):
            keep = 1 - lr * float(group["weight_decay"])
            for coordinate in coordinates:
                coordinate.drop()
                coordinate.decay(keep)
                if isinstance(coordinate, GuidedCoordinate) and coordinate.guided:
                    value = coordinate.value()
                    value = run.rule.update(coordinate.name, value, coordinate.of_guide(derivatives[id(coordinate)]), lr, 0.0)
                    coordinate.assign(value, self.state.seed, record.step)

    def _companies(self, coordinates: list[Coordinate]) -> list[UpdateGroup]:
        """A group's coordinates, those that are updated together as one; found once."""
        found = self._together.get(id(coordinates))
        if found is None:
            found = self._together[id(coordinates)] = list(together(coordinates))
        return found

    def _update(self, coordinate: UpdateGroup, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> None:
        """Update a coordinate; a weight that is offloaded as soon as it is back."""
        work = partial(self._move, coordinate, step, coefficients, lr, weight_decay, self.state.past)
        if isinstance(coordinate, Coordinate) and not isinstance(coordinate, LowRankCoordinate):
            placement.when_at_hand(coordinate.parameter, work)
        else:
            work()

    @tagged("update")
    def _move(
        self, coordinate: UpdateGroup, step: int, coefficients: Sequence[float], lr: float, weight_decay: float, past: Sequence[Past]
    ) -> None:
        run, seed = self.run, self.state.seed
        k = len(coefficients)
        rate = lr * coordinate.lr_scale
        if isinstance(coordinate, Coordinate) and coordinate.turn is not None:
            turns = [coordinate.moves(step, direction) for direction in range(k)]
            if not any(turns):
                coordinate.drop()
                return
            coefficients = [c if turn else 0.0 for c, turn in zip(coefficients, turns, strict=True)]
        if run.method.replayed is not None:
            assert isinstance(coordinate, Coordinate)
            coordinate.drop()
            value = coordinate.value()
            if weight_decay:
                value.mul_(1 - lr * weight_decay)
            run.method.replayed.move(coordinate, value, past, rate, run.directions, seed)
            coordinate.assign(value, seed, step)
            return
        if run.rule.plain:
            weights = [-rate * (c / k) for c in coefficients]
            coordinate.descend(run.directions, weights, 1 - lr * weight_decay, seed, step)
            coordinate.drop()
            return
        assert isinstance(coordinate, Coordinate)
        value = coordinate.value()
        weights = [c / k for c in coefficients]
        estimate = coordinate.weighted(run.directions, weights, seed, step).to(value.dtype)
        coordinate.drop()
        if weight_decay and not coordinate.decays_weights:
            coordinate.decay(1 - lr * weight_decay)
            weight_decay = 0.0
        value = run.rule.update(coordinate.name, value, estimate, rate, weight_decay)
        coordinate.assign(value, seed, step)

    # -- between steps -------------------------------------------------------------------------------------------------------------------

    @tagged("update")
    def apply_event(self, event: Mapping[str, Any]) -> None:
        """What happened between two steps.

        Raises:
            ValueError: another version wrote an event that this one does not know.
        """
        run, state = self.run, self.state
        if event.get("event") == "fold":
            self.fold()
        elif event.get("event") == "eps":
            state.eps = float(event["value"])
        elif event.get("event") == "observed":
            self.observed(state.gathered.add(event))
        elif event.get("event") == "scales":
            self.begin(state.steps)
            for layer, scale in zip(run.layers, event["values"], strict=True):
                for coordinate in layer:
                    run.rule.transport(coordinate.name, coordinate.rescale(float(scale), state.seed, state.steps))
        elif event.get("event") == "measured":
            pass  # what came of it is in the steps' learning rates
        elif event.get("event") == "forward_batching":
            run.evaluator.restore(event["batched"], event.get("apart", False))
        elif event.get("event") == "general_path":
            run.forward.distrust(event["names"])
            state.prepared = True
        else:
            raise ValueError(f"this version of zotune does not know the journal event {event.get('event')!r}.")

    @tagged("update")
    def begin(self, step: int) -> None:
        """Prepare every coordinate for a step, once: redraws, and moments carried across them."""
        if self.state.begun == step:
            return
        for coordinate in self.state.every_coordinate():
            carry = coordinate.begin_step(self.state.seed, step)
            if carry is not None:
                self.run.rule.transport(coordinate.name, carry)
        self.state.begun = step

    @tagged("update")
    def fold(self) -> None:
        """Write pending low-rank updates into the weights."""
        for coordinate in self.state.every_coordinate():
            if isinstance(coordinate, LowRankCoordinate):
                coordinate.fold()

    def observed(self, tensors: Mapping[str, Tensor]) -> None:
        """Give coordinates what the subspace has observed of them, for their next redraw."""
        for coordinate in self.run.forward.coordinates:
            if coordinate.name in tensors:
                coordinate.observed = tensors[coordinate.name]
