"""What a journal's record does to a run: the update of a step, and the events between steps. Replaying a run is nothing else.

Nothing here reads a batch or a loss function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.methods.history import PastStep
from zotune.optim.construction import RunParts
from zotune.optim.journal_records import Record, StepRecord
from zotune.optim.layer_projection import LayerProjections
from zotune.optim.step_transforms import HistoryTransform, Terms
from zotune.subspaces import GuidedCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, CoordinateGroup
from zotune.subspaces.scaled_directions import TransformedCoordinate
from zotune.weights import placement

#: What one call updates: a coordinate, or several at once.
UpdateGroup = Coordinate | CoordinateGroup


def update_groups(coordinates: Sequence[Coordinate]) -> Iterator[UpdateGroup]:
    """The same coordinates; a multi-tensor group or flat buffer whose members are all among them stands for these."""
    groups = [c.multi_tensor or (c.flat_buffer if c.flat_buffer and c.flat_buffer.stored else None) for c in coordinates]
    members = Counter(id(group) for group in groups)
    seen: set[int] = set()
    for coordinate, group in zip(coordinates, groups, strict=True):
        if group is None or members[id(group)] < len(group.members):
            yield coordinate
        elif id(group) not in seen:
            seen.add(id(group))
            yield group


def decay_of(group: Mapping[str, Any], coordinates: Sequence[Coordinate]) -> float:
    """λ of a parameter group's decay, toward 0 or, of anchored coordinates, toward their anchor.

    Raises:
        ValueError: ``anchor_decay`` was set after the optimizer was constructed.
    """
    weight, anchor = float(group["weight_decay"]), float(group["anchor_decay"])
    if anchor and not all(coordinate.anchored for coordinate in coordinates):
        raise ValueError("the weights that training began with are not known: give anchor_decay when the optimizer is constructed.")
    return anchor or weight


class Updater:
    """Applies journal records to the weights of a run."""

    def __init__(self, run: RunParts) -> None:
        self.run, self.state = run, run.state
        self.history = run.transform(HistoryTransform)
        self.groupable = run.rule.plain and self.history is None
        self._groups: dict[int, list[UpdateGroup]] = {}  # by id of a parameter group's coordinates

    @tagged("update")
    def apply(self, record: Record) -> None:
        """Apply the update or the event that a record describes.

        Raises:
            ValueError: the record is not the next one of this run, or another version's.
        """
        if isinstance(record, dict):
            self.apply_event(record)
            return
        run, state = self.run, self.state
        if record.step != state.steps or len(record.lrs) != len(run.param_groups):
            raise ValueError(f"the record of step {record.step} does not follow step {state.steps - 1} of this run.")
        if run.evaluator.choice.undecided:  # a run's step without an event that says otherwise
            run.evaluator.restore(True, True)
        if run.private is not None:
            run.private.extend(record)
        self.begin(record.step)
        state.steps += 1
        k = run.directions_in(record)
        terms, skipped = Terms((PastStep(record.step, record.coefficients[:k]),)), all(record.skipped)
        along_output_gradients = run.along_output_gradients
        for transform in () if along_output_gradients else run.transforms:
            terms = transform.after_journal(terms, record, skipped)
        state.terms = ()
        if skipped:  # nothing is updated, momentum included
            state.nonfinite_in_a_row += 1
            run.forward.drop_directions()
            return
        state.nonfinite_in_a_row = 0
        if along_output_gradients:
            self._apply_output_gradients(record)
            return
        state.terms = terms.terms
        self._apply_terms(terms, record, k)

    def _apply_terms(self, terms: Terms, record: StepRecord, k: int) -> None:
        """Give the update rule the estimates of some steps' directions, one after the other."""
        run = self.run
        for place, term in enumerate(terms.terms):
            for group, coordinates, lr in zip(run.param_groups, self.state.coordinates, record.lrs, strict=True):
                weight_decay = 0.0 if place else decay_of(group, coordinates)
                for coordinate in self._update_groups(coordinates) if self.groupable else coordinates:
                    learning = coordinate if isinstance(coordinate, TransformedCoordinate) else None
                    if learning is not None and learning.renew_first:
                        learning.drop()  # directions of the evaluations, made from what it was before
                        self._learn(learning, term, record, k)
                    self._schedule(coordinate, term.step, term.coefficients, terms.factor * lr, weight_decay)
                    if learning is not None and not learning.renew_first:
                        self._learn(learning, term, record, k)
        if not terms.terms:
            run.forward.drop_directions()

    def _learn(self, coordinate: TransformedCoordinate, term: PastStep, record: StepRecord, k: int) -> None:
        coordinate.learn(self.run.directions, term.coefficients, record.coefficients[k:], self.state.seed, term.step)

    def _apply_output_gradients(self, record: StepRecord) -> None:
        """A step along output gradients: coefficients are derivatives along the elements of S, layer by layer; nothing else is trained."""
        run = self.run
        assert run.output_gradients is not None
        derivatives = {id(coordinate): part for coordinate, part in run.output_gradients.parts(torch.tensor(record.coefficients))}
        for group, coordinates, lr in zip(run.param_groups, self.state.coordinates, record.lrs, strict=True):
            keep = 1 - lr * decay_of(group, coordinates)
            for coordinate in coordinates:
                coordinate.drop()
                if not coordinate.decays_weights:
                    coordinate.decay(keep)
                elif keep != 1:  # a vector of a group with decay
                    coordinate.assign(coordinate.decayed(coordinate.value(), keep), self.state.seed, record.step)
                if isinstance(coordinate, GuidedCoordinate) and coordinate.guided:
                    value, along = coordinate.value(), derivatives[id(coordinate)]
                    direction = coordinate.step_direction(along)
                    coordinate.advance(along)
                    value = run.rule.update(coordinate.name, value, coordinate.expand_guided(direction), lr, 0.0)
                    coordinate.assign(value, self.state.seed, record.step)

    def _update_groups(self, coordinates: list[Coordinate]) -> list[UpdateGroup]:
        found = self._groups.get(id(coordinates))
        if found is None:
            found = self._groups[id(coordinates)] = list(update_groups(coordinates))
        return found

    def _schedule(self, coordinate: UpdateGroup, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> None:
        """Update a coordinate; an offloaded weight as soon as it is loaded."""
        past = [] if self.history is None or not isinstance(coordinate, Coordinate) else self.history.past_of(coordinate.name)
        work = partial(self._update, coordinate, step, coefficients, lr, weight_decay, past)
        if isinstance(coordinate, Coordinate) and not isinstance(coordinate, LowRankCoordinate):
            placement.when_loaded(coordinate.parameter, work)
        else:
            work()

    @tagged("update")
    def _update(
        self, coordinate: UpdateGroup, step: int, coefficients: Sequence[float], lr: float, weight_decay: float, past: Sequence[PastStep]
    ) -> None:
        run, seed = self.run, self.state.seed
        k = len(coefficients)
        rate = lr * coordinate.lr_scale
        if isinstance(coordinate, Coordinate) and coordinate.schedule is not None:
            active = [coordinate.is_active(step, direction) for direction in range(k)]
            if not any(active):
                coordinate.drop()
                return
            coefficients = [c if kept else 0.0 for c, kept in zip(coefficients, active, strict=True)]
        if self.history is None and run.rule.plain:
            weights = [-rate * (c / k) for c in coefficients]
            coordinate.descend(run.directions, weights, 1 - lr * weight_decay, seed, step)
            coordinate.drop()
            return
        assert isinstance(coordinate, Coordinate)
        if self.history is not None:
            coordinate.drop()
            value = coordinate.value()
            value = coordinate.decayed(value, 1 - lr * weight_decay)
            self.history.history.update(coordinate, value, past, rate, run.directions, seed)
        else:
            value = coordinate.value()
            weights = [c / k for c in coefficients]
            estimate = coordinate.weighted(run.directions, weights, seed, step).to(value.dtype)
            coordinate.drop()
            if weight_decay and not coordinate.decays_weights:
                coordinate.decay(1 - lr * weight_decay)
                weight_decay = 0.0
            elif coordinate.anchored:
                value = coordinate.decayed(value, 1 - lr * weight_decay)
                weight_decay = 0.0
            value = run.rule.update(coordinate.name, value, estimate, rate, weight_decay)
        coordinate.assign(value, seed, step)

    # -- between steps -------------------------------------------------------------------------------------------------------------------

    @tagged("update")
    def apply_event(self, event: Mapping[str, Any]) -> None:
        """Apply what happened between two steps.

        Raises:
            ValueError: this version does not know the event.
        """
        run, state = self.run, self.state
        match event.get("event"):
            case "fold":
                self.fold()
            case "eps":
                state.eps = float(event["value"])
            case "observed":
                self.observed(state.assembler.add(event))
            case "scales":
                self.begin(state.steps)
                for layer, scale in zip(run.layers, event["values"], strict=True):
                    for coordinate in layer:
                        run.rule.transport(coordinate.name, coordinate.rescale(float(scale), state.seed, state.steps))
            case "projection":
                projections = run.transform(LayerProjections)
                if projections is None:
                    raise ValueError(f"{run.method.name} projects no layers.")
                projections.apply(event["ratios"], state.seed, state.steps)
            case "residual":
                if run.output_gradients is not None:
                    run.output_gradients.reject(event["rejected"])
            case "measured" | "attribution":
                pass  # the steps' records contain the result
            case "forward_batching":
                run.evaluator.restore(event["batched"], event.get("rowwise", False))
            case "general_path":
                run.forward.disable_hooks(event["names"])
                state.prepared = True
            case name:
                raise ValueError(f"this version of zotune does not know the journal event {name!r}.")

    @tagged("update")
    def begin(self, step: int) -> None:
        """Begin a step once: redraw coordinates, and carry the rule's moments across redraws."""
        if self.state.begun == step:
            return
        if self.run.anchor is not None:
            self.run.anchor.check_stored()
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
        """Give coordinates what the subspace observed, for their next redraw."""
        for coordinate in self.run.forward.coordinates:
            if coordinate.name in tensors:
                coordinate.observed = tensors[coordinate.name]
