"""The perturbed forward: evaluates a model at θ + offset without writing to any weight.

A module sees a perturbed weight in one of two ways:

- **overrides** (the general path, any module; ``overrides``): for the length of an evaluation the module's parameter table is replaced by
  one that computes θ + offset when ``module.weight`` is read;
- **low-rank hooks** (``low_rank_hook``): low-rank coordinates of Linear, Conv1D and Embedding layers, without a perturbed weight.

Several points are evaluated at once (``batches``) by overriding with *batched parameters*, for layers with a batched form.

Stored tensors are only read: whatever a forward raises, the model is unchanged bit for bit, and the tables are restored.
:meth:`PerturbedForward.prepare` compares hooks and general path once on real data and disables hooks that disagree.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zotune.errors import NotBatchableError
from zotune.forward import materialized, path_check
from zotune.forward.active import activated
from zotune.forward.batch_context import BatchContext
from zotune.forward.batches import BatchLayout
from zotune.forward.by_block import ByBlock, read
from zotune.forward.jvp import ForwardMode, dual
from zotune.forward.lazy_weight import WeightBuffer
from zotune.forward.low_rank_hook import LowRankHook
from zotune.forward.overrides import Factories, OverriddenParameters, Overrides
from zotune.forward.siblings import siblings_of
from zotune.io.execution import REAL, current
from zotune.rng.counter import prefetch
from zotune.rng.directions import Directions, Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.flat_buffer import build_flat_buffers
from zotune.subspaces.multi_tensor import build_multi_tensor_groups
from zotune.weights import placement
from zotune.weights.computed_linear import is_computed
from zotune.weights.kept_buffers import KeptBuffers
from zotune.weights.precision import HALF
from zotune.weights.structure import module_mode

T = TypeVar("T")


class PerturbedForward:
    """Evaluates functions of a model at points θ + offset.

    Args:
        model: any module.
        coordinates: the coordinates of its trainable parameters (see ``subspaces``).
        directions: the distribution of Z.

    Attributes:
        devices: of the coordinates.
        sharded: whether a parameter is split among processes, which then have to evaluate the same points together.
        streams: whether a parameter is offloaded between forwards.
        by_engine: whether an engine computes some layers, which evaluates one point at a time.
        rounds: whether it rounds what it computes, weights or activations, to a few bits.
        by_block: modules that a batched evaluation calls block by block.
        low_rank_hooks: the hooks on the model.
        buffers: of the model, which evaluations put back.

    Example:
        >>> from zotune.subspaces import Full
        >>> model = nn.Linear(3, 1)
        >>> forward = PerturbedForward(model, [Full().coordinate(n, p) for n, p in model.named_parameters()], Directions("gaussian"))
        >>> plus = forward.evaluate(lambda: model(torch.ones(1, 3)), Offset(1e-3, seed=0, step=0, direction=0))
    """

    def __init__(self, model: nn.Module, coordinates: Sequence[Coordinate], directions: Directions) -> None:
        self.model = model
        self.directions = directions
        self.coordinates = list(coordinates)
        self._low_rank = [c for c in self.coordinates if isinstance(c, LowRankCoordinate)]
        self._numel = sum(c.numel for c in self.coordinates)
        self._flat_buffers = build_flat_buffers(self.coordinates)
        build_multi_tensor_groups(self.coordinates, directions)
        self.devices = sorted({c.device for c in self.coordinates}, key=str)
        self._overrides = Overrides(model, self.coordinates)
        self.by_block = ByBlock(model, {id(o.module): list(o.parameters.values()) for o in self._overrides.owners})
        self.siblings = siblings_of(model, {id(c.parameter): c for c in self.coordinates})
        self.sharded = any(placement.is_sharded(parameter) for parameter in model.parameters())
        self.streams = any(placement.offload_handle(parameter) is not None for parameter in model.parameters())
        self.by_engine = is_computed(model)
        self.rounds = self.by_engine and not model.engine.exact  # type: ignore[union-attr]
        self.forward_mode = ForwardMode()
        self.buffers = KeptBuffers(model)
        self.low_rank_hooks: list[LowRankHook] = []
        self._attach_hooks()
        self._materializable = set() if self.sharded else self._find_materializable()

    # -- evaluation ---------------------------------------------------------------------------------------------------------------

    def evaluate(self, function: Callable[[], T], offset: Offset | None, only: Collection[str] | None = None) -> T:
        """``function()`` with the model at θ + offset (None: at θ); no autograd graph, evaluation mode, generators isolated.

        ``only``: names of the coordinates that are perturbed; None: all.
        """
        # Not inference_mode, which is a few percent faster: what a model or a loss keeps from a forward (a table of positions, a running
        # mean) has to stay an ordinary tensor, for a later backward pass or an update in place.
        with self._evaluating(offset is not None), self.at(offset, only=only):
            if offset is None:
                return function()
            with isolated_generators(_loss_key(offset), self.devices):
                return function()

    @contextmanager
    def _evaluating(self, runs: bool = True) -> Iterator[None]:
        """Evaluation mode without an autograd graph; buffers stay as they are. ``runs``: whether the model is run for certain."""
        with torch.no_grad(), module_mode(self.model, training=False), self.buffers.kept(runs):
            yield

    def tangent(self, function: Callable[[], Any], offset: Offset) -> tuple[Tensor, Tensor]:
        """The loss ``function()`` at θ and its derivative along the direction of ``offset``, in one forward; see ``jvp``.

        Raises:
            ValueError: something between the weights and the loss has no forward derivative.
        """
        factories = self._overrides.factories(dual, self.directions, offset)
        with self._evaluating(), self._overrides.active(factories, self._reset_hooks):
            return self.forward_mode.derivative(function, lambda: isolated_generators(_loss_key(offset), self.devices))

    def evaluate_batched(self, function: Callable[[], T], layout: BatchLayout) -> T:
        """``function()`` on the rows of ``layout``, each block of rows at its own point.

        Raises:
            NotBatchableError: the model uses a parameter in a function without a batched form.
        """
        before, reasons = len(self.by_block.names), []
        while True:
            context = BatchContext(layout, self.directions, self.siblings)
            try:
                with isolated_generators(_loss_key(layout), self.devices):
                    found = self.evaluate_in(function, context)
            except NotBatchableError as reason:
                reasons.append(reason)
                if context.reader is None or not self.by_block.widen(context.reader):
                    raise reasons[:2][-1] from None  # of the smallest module that could not be called block by block
                continue
            if not before and self.by_block.names and current() is REAL:
                names = self.by_block.names
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                warnings.warn(
                    f"{names[0]}{more} cannot be evaluated with several weights at once: called once for each direction or point instead; "
                    "results are right, steps are slower.",
                    stacklevel=2,
                )
            return found

    def evaluate_in(self, function: Callable[[], T], context: BatchContext) -> T:
        """:meth:`evaluate_batched` in a given context, without isolating generators."""
        try:
            owners = self._overrides.owners
            factories: dict[int, Factories] = {
                id(o): {name: partial(read, o.module, c, context) for name, c in o.parameters.items()} for o in owners
            }
            overridden = self._overrides.active(factories, self._reset_hooks)
            with self._evaluating(), overridden as tables, self.by_block.active(context), activated(tables, context):
                for coordinate in self._low_rank:
                    coordinate.hook_core = None  # batched parameters include A
                return function()
        finally:
            context.clear()

    @property
    def dense(self) -> Coordinate | None:
        """A coordinate of which several directions cannot be evaluated at once, if there is one."""
        return next((c for c in self.coordinates if not c.thin), None)

    @property
    def batches_dense(self) -> bool:
        """Whether all points of one direction can be evaluated at once all the same, by a perturbed weight for each."""
        return all(c.thin or (type(c) is FullCoordinate and len(c.shape) == 2) for c in self.coordinates)

    @contextmanager
    def at(self, offset: Offset | None, *, hooks: bool = True, only: Collection[str] | None = None) -> Iterator[list[OverriddenParameters]]:
        """For the length of a block, the model is at θ + offset.

        Args:
            offset: None: θ.
            hooks: False: the general path for all parameters.
            only: names of the coordinates that are perturbed; None: all.
        """
        factories: dict[int, Factories] = {}
        buffer = WeightBuffer(self._numel)
        if offset is not None:
            for owner in self._overrides.owners:
                for name, coordinate in owner.parameters.items():
                    if only is not None and coordinate.name not in only:
                        continue
                    if not (hooks and isinstance(coordinate, LowRankCoordinate) and coordinate.uses_hook):
                        factories.setdefault(id(owner), {})[name] = owner.factory(coordinate, self.directions, offset, buffer)
                    elif self._materializable and self._materializes(coordinate, offset):
                        make = materialized.weight_factory(coordinate, self.directions, offset)
                        factories.setdefault(id(owner), {})[name] = make
        with self._overrides.active(factories, self._reset_hooks) as tables:
            for coordinate in self._low_rank:
                if only is not None and coordinate.name not in only:
                    continue
                if not hooks or (self._materializable and self._materializes(coordinate, offset)):
                    coordinate.hook_core = None  # the weight that is read includes A
                elif coordinate.uses_hook:
                    active = offset is not None and coordinate.is_active(offset.step, offset.direction)
                    coordinate.set_hook_core(self.directions, offset if active else None)
            with activated(tables):
                yield tables

    def _materializes(self, coordinate: LowRankCoordinate, offset: Offset | None) -> bool:
        """Whether its layer reads a weight that it may materialize, instead of using the hook."""
        if coordinate.name not in self._materializable or not coordinate.uses_hook:
            return False
        return offset is not None and coordinate.is_active(offset.step, offset.direction)

    def replace_coordinates(self, coordinates: Mapping[str, Any]) -> AbstractContextManager[None]:
        """For the length of a block, other objects, with a method ``at``, replace the coordinates of these names."""
        return self._overrides.replace_coordinates(coordinates)

    def prefetch(self, seed: int, step: int) -> None:
        """Do the host's work for the directions of ``step`` while a device is busy."""
        if len(self.devices) == 1 and self.devices[0].type != "cpu":
            prefetch(seed, step, [c.name for c in self.coordinates], self.devices[0])
            for buffer in self._flat_buffers:
                buffer.prefetch(self.directions, seed, step)

    def drop_directions(self) -> None:
        """Discard the directions that are cached between a step's evaluations and its update."""
        for coordinate in self.coordinates:
            coordinate.drop()

    # -- hooks --------------------------------------------------------------------------------------------------------------------

    def _attach_hooks(self) -> None:
        for coordinate in self._low_rank:
            owners = [(o.module, name) for o in self._overrides.owners for name, c in o.parameters.items() if c is coordinate]
            if not all(LowRankHook.fits(module, name) for module, name in owners):
                coordinate.fold_every_step()
                continue
            try:
                self.low_rank_hooks += [LowRankHook(module, name, coordinate, self) for module, name in owners]
            except BaseException:
                self.remove_hooks()
                raise

    def _find_materializable(self) -> set[str]:
        """Names of the weights that only one layer reads, on a device where it may materialize them."""
        pairs = [(owner, c) for owner in self._overrides.owners for c in owner.parameters.values() if isinstance(c, LowRankCoordinate)]
        count = Counter(id(c) for _, c in pairs)
        return {c.name for owner, c in pairs if owner.rule is not None and count[id(c)] == 1 and owner.rule.materializes(owner.module, c)}

    def _reset_hooks(self) -> None:
        """Hooks add the product at θ."""
        for coordinate in self._low_rank:
            coordinate.hook_core = coordinate.core

    def disable_hooks(self, names: Sequence[str]) -> None:
        """The named coordinates take the general path from now on."""
        for hook in [hook for hook in self.low_rank_hooks if hook.coordinate.name in names]:
            hook.remove()
            self.low_rank_hooks.remove(hook)
        for coordinate in self._low_rank:
            if coordinate.name in names and coordinate.uses_hook:
                coordinate.fold_every_step()

    def remove_hooks(self) -> None:
        """Remove every hook from the model."""
        for hook in self.low_rank_hooks:
            hook.remove()
        self.low_rank_hooks.clear()

    def agree(self, fast: Tensor, general: Tensor, base: Tensor) -> bool:
        """Whether two evaluations of perturbed losses agree, given the losses at θ; see :func:`path_check.agree`."""
        half = any(p.dtype in HALF for p in self.model.parameters())  # also with a float32 adapter on a half-precision model
        return path_check.agree(fast, general, base, half=half)

    def prepare(self, function: Callable[[], Tensor], offset: Offset) -> list[str]:
        """Compare hooks and general path on one evaluation; the names of coordinates whose hooks are disabled, each with a warning."""
        if not self.low_rank_hooks or self.by_engine:  # an engine has no general path
            return []

        def evaluate(at: Offset | None, hooks: bool, only: Collection[str] | None) -> tuple[Tensor, list[OverriddenParameters]]:
            with (
                self._evaluating(),
                self.at(at, hooks=hooks, only=only) as tables,
                isolated_generators(_loss_key(offset), self.devices),
            ):
                return function().detach().float(), tables

        return path_check.check(evaluate, self.low_rank_hooks, offset, self.agree, self.disable_hooks)


def _loss_key(at: Offset | BatchLayout) -> Key:
    """The key of the generators that a loss sees in a step."""
    return Key(at.seed, at.step, 0, "", "loss")
