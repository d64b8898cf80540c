"""The parts of a run (:class:`RunParts`), their construction from a model and a method, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from zotune.forward.low_rank_hook import release_abandoned
from zotune.forward.model import PerturbedForward
from zotune.methods import Method
from zotune.methods.coefficients import ConservativeStep, Fitness, Shaping, State
from zotune.methods.estimators import ESTIMATORS, Estimator
from zotune.methods.history import CoefficientHistory
from zotune.methods.kernel import Kernel
from zotune.methods.layer_projection import LayerProjection
from zotune.methods.output_window import OutputWindow
from zotune.methods.rules import Rule
from zotune.methods.selection import Selection
from zotune.methods.svrg import SVRGSchedule
from zotune.optim import privacy_refusals
from zotune.optim.anchor import Anchor
from zotune.optim.calibration import layer_scales
from zotune.optim.calibration.calibrator import Calibrator
from zotune.optim.distributed.workers import Workers
from zotune.optim.evaluator import FORWARD_BATCHING, Evaluator
from zotune.optim.journal_records import StepRecord
from zotune.optim.layer_projection import LayerProjections
from zotune.optim.output_gradient_steps import OutputGradientSteps
from zotune.optim.output_window import WindowTransform
from zotune.optim.privacy import Privacy, PrivateSteps
from zotune.optim.selection import SelectedDirection
from zotune.optim.state import RunState, SampleBatches
from zotune.optim.step_transforms import (
    ConservativeChoice,
    FitnessTransform,
    HistoryTransform,
    KernelWeights,
    ShapingTransform,
    StepTransform,
)
from zotune.optim.svrg import SVRGCorrection
from zotune.rng import sparse_directions
from zotune.rng.directions import Directions
from zotune.subspaces import CodeCoordinate, Full, Guided, LowRank, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate
from zotune.weights import placement, quantized_linear
from zotune.weights.computed_linear import NO_DECAY, WRITES, is_computed
from zotune.weights.external_linear import is_external
from zotune.weights.structure import refuse_compiled

#: Types of weights that an update can write.
WRITTEN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

NO_CODES = (
    "{} trains the integers of quantized Linear layers, and this model has none: quantize it (--quantize int8 or int4, in Python "
    "zotune.weights.quantized_linear.quantize), or take another method."
)
NOTHING_TRAINED = "the model has no trainable parameter; set requires_grad=True on those to train."

T = TypeVar("T", bound=StepTransform)


@dataclass(frozen=True)
class RunParts:
    """The objects that take a run's steps together, and the state that they share.

    Attributes:
        model: what is trained.
        param_groups: the optimizer's, with the current learning rates and decays.
        anchor: the weights that training began with, where they are kept.
        method, rule, estimator, directions: the four choices of a step.
        layers: low-rank coordinates whose scales are measured, by layer.
        forward: evaluates the model at a point.
        evaluator: evaluates a step's points.
        transforms: what is done to a step's coefficients, in order.
        workers: the processes that take the steps together.
        calibrator: chooses ε or η, where one is measured.
        output_gradients: takes the steps along output gradients, where the method has some.
        sample_batches: more examples than a step's, where available.
        private: clips coefficients and adds noise, where the run is private.
        state: what steps change.
    """

    model: nn.Module
    param_groups: list[dict[str, Any]]
    method: Method
    rule: Rule
    estimator: Estimator
    directions: Directions
    layers: list[list[LowRankCoordinate]]
    forward: PerturbedForward
    evaluator: Evaluator
    transforms: list[StepTransform]
    workers: Workers
    calibrator: Calibrator | None
    output_gradients: OutputGradientSteps | None
    anchor: Anchor | None
    sample_batches: SampleBatches | None
    private: PrivateSteps | None
    state: RunState

    @property
    def along_output_gradients(self) -> bool:
        """Whether the steps of this phase go along output gradients."""
        return self.output_gradients is not None and self.output_gradients.active

    def transform(self, kind: type[T]) -> T | None:
        """The transform of this kind, if the method has one."""
        return next((transform for transform in self.transforms if isinstance(transform, kind)), None)

    @property
    def shaping_state(self) -> State:
        """What the shaping of coefficients has recorded."""
        shaping = self.transform(ShapingTransform)
        return {} if shaping is None else shaping.values

    def directions_in(self, record: StepRecord) -> int:
        """K of a step: behind its coefficients a record has curvatures, or what an output window needs."""
        if isinstance(self.method.history, OutputWindow):
            return self.method.directions_of(0)
        return len(record.coefficients) // (2 if self.method.estimator == "curvature" else 1)

    def rates(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.param_groups]


def parameter_groups(
    model: nn.Module, params: Iterable[Any] | None, weight_decay: float, anchor_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them; weight decay is for matrices, unless the groups are given.

    Raises:
        ValueError: nothing is trainable.
    """
    decays = {"weight_decay": weight_decay, "anchor_decay": anchor_decay}
    if params is not None:
        given = list(params)
        if given and isinstance(given[0], dict):
            return [{**decays, **group, "params": list(group["params"])} for group in given]
        trainable = given
    else:
        trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(NOTHING_TRAINED)
    if not weight_decay:
        return [{"params": trainable, **decays}]
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() <= 1]
    groups = [{"params": matrices, **decays}, {"params": vectors, **decays, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build(
    model: nn.Module,
    method: Method,
    rule: Rule,
    param_groups: list[dict[str, Any]],
    *,
    seed: int,
    forward_batching: str,
    cuda_graphs: bool | str,
    workers: Workers,
    sample_batches: SampleBatches | None,
    measured: bool,
    anchor: Anchor | None = None,
    privacy: Privacy | None = None,
) -> RunParts:
    """The parts of a run; ``measured``: the learning rate is.

    Raises:
        ValueError: the method cannot train this model, it is compiled, or it is being trained by another optimizer.
    """
    release_abandoned(model)
    refuse_compiled(model)
    if privacy is not None:
        reason = privacy_refusals.MEASURED_RATE if measured else privacy_refusals.SEVERAL if workers.several else None
        reason = reason or privacy_refusals.refusal(method)
        if reason is not None:
            raise ValueError(reason)
    if method.subspace.quantized and any(group["weight_decay"] or group["anchor_decay"] for group in param_groups):
        raise ValueError(
            f"{method.name} changes quantized weights by whole numbers, so they cannot decay: set weight_decay and anchor_decay to 0."
        )
    decaying = [group["anchor_decay"] > 0 for group in param_groups]
    if any(decaying) and anchor is None:
        anchor = Anchor(model, [p for group in param_groups for p in group["params"]])
    groups = [_coordinates(model, method, rule, group) for group in param_groups]
    coordinates = [c for group in groups for c in group]
    if not coordinates and method.subspace.quantized and is_computed(model):
        raise ValueError(WRITES.format(method.name))
    if not coordinates:
        raise ValueError(NO_CODES.format(method.name) if method.subspace.quantized else NOTHING_TRAINED)
    if anchor is not None:
        anchor.check(coordinates)
        anchor.attach(c for group, decays in zip(groups, decaying, strict=True) if decays for c in group)
    shaping = method.shaping and method.shaping.sized(sum(c.parameter.numel() for c in coordinates))
    method = dataclasses.replace(method, blocks=method.subspace.attach(model, coordinates), shaping=shaping)
    estimator = ESTIMATORS[method.estimator]
    layers = _scaled_layers(method, coordinates)
    directions = sparse_directions.directions(method.direction, {c.name: c.shape for c in coordinates})
    state = RunState(seed, groups, math.nan if isinstance(method.eps, str) else method.eps)
    forward = PerturbedForward(model, coordinates, directions)
    try:
        if isinstance(method.history, OutputWindow) and forward_batching in FORWARD_BATCHING:
            forward_batching = "sequential"  # its points differ in what is recorded
        evaluator = Evaluator(forward, method, estimator, forward_batching, state, workers, cuda_graphs)
        unknown_eps = math.isnan(state.eps)
        scale = sum(c.lr_scale * c.parameter.numel() for c in coordinates) / max(1, sum(c.parameter.numel() for c in coordinates))
        calibrator = Calibrator(forward, method, rule, scale, unknown_eps, measured) if measured or unknown_eps else None
        subspace = method.subspace
        output_gradients = None
        if isinstance(subspace, Guided):
            output_gradients = OutputGradientSteps(forward, evaluator, rule, subspace.interval, measured)
        return RunParts(
            model=model,
            param_groups=param_groups,
            method=method,
            rule=rule,
            estimator=estimator,
            directions=directions,
            layers=layers,
            forward=forward,
            evaluator=evaluator,
            transforms=_step_transforms(method, evaluator, estimator, state),
            workers=workers,
            calibrator=calibrator,
            output_gradients=output_gradients,
            anchor=anchor,
            sample_batches=sample_batches,
            private=None if privacy is None else PrivateSteps(privacy),
            state=state,
        )
    except BaseException:
        forward.remove_hooks()
        raise


def _step_transforms(method: Method, evaluator: Evaluator, estimator: Estimator, state: RunState) -> list[StepTransform]:
    """What applies each of a method's transforms."""
    found: list[StepTransform] = []
    for transform in method.transforms:
        match transform:
            case Fitness():
                found.append(FitnessTransform(transform))
            case SVRGSchedule():
                found.append(SVRGCorrection(transform, evaluator, estimator, state))
            case Kernel():
                found.append(KernelWeights(transform))
            case Selection():
                found.append(SelectedDirection(transform, evaluator, state))
            case ConservativeStep():
                found.append(ConservativeChoice(evaluator, state))
            case Shaping():
                found.append(ShapingTransform(transform, state))
            case OutputWindow():
                found.append(WindowTransform(transform, evaluator, state))
            case CoefficientHistory():
                found.append(HistoryTransform(transform))
            case LayerProjection():
                found.append(LayerProjections(transform, evaluator))
            case _:
                raise TypeError(f"nothing applies the transform {type(transform).__name__} of {method.name}.")
    return found


def _scaled_layers(method: Method, coordinates: list[Coordinate]) -> list[list[LowRankCoordinate]]:
    subspace = method.subspace
    if not (isinstance(subspace, LowRank) and subspace.layer_scales):
        return []
    return layer_scales.layers([c for c in coordinates if isinstance(c, LowRankCoordinate)])


def _coordinates(model: nn.Module, method: Method, rule: Rule, group: dict[str, Any]) -> list[Coordinate]:
    """The coordinates of a parameter group."""
    names = {id(p): name for name, p in model.named_parameters()}
    if group["weight_decay"] and group["anchor_decay"]:
        raise ValueError("weight_decay shrinks weights toward 0, anchor_decay toward those that training began with: set one of them to 0.")
    if group["weight_decay"] and not rule.takes_weight_decay:
        raise ValueError(f"the update rule {rule.cls.__name__} has no weight decay; set weight_decay=0.")
    if group["weight_decay"] and is_computed(model):
        raise ValueError(NO_DECAY)
    coordinates = []
    for parameter in group["params"]:
        name = names.get(id(parameter))
        if name is None:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not one of the model's own parameters.")
        if not parameter.numel():  # there is nothing to train in it
            continue
        if method.subspace.quantized and type(quantized_linear.owner_of(parameter)) is not quantized_linear.QuantizedLinear:
            continue
        _check_writable(name, parameter)
        if placement.is_sharded(parameter) and not _takes_shards(method, rule):
            raise ValueError(
                f"{name} is sharded, and {method.name} cannot train shards: take a method that trains full weights or low-rank "
                "ones by plain SGD, with directions_per 'batch' (mezo, lozo)."
            )
        if is_external(parameter):
            raise ValueError(
                f"{name} is quantized by another library, which cannot be written: call zotune.weights.external_linear.wrap(model) "
                "and take a low-rank method (lozo), or train an adapter (PEFT)."
            )
        coordinate = method.subspace.coordinate(name, parameter)
        if method.rounding == "residual":
            coordinate.use_residual()
        _check_placement(model, method, coordinate)
        coordinates.append(coordinate)
    return coordinates


def _check_writable(name: str, parameter: torch.Tensor) -> None:
    """Refuse before the first step what its update could not write."""
    external = parameter.is_floating_point() and is_external(parameter)
    if external or placement.is_sharded(parameter) or quantized_linear.owner_of(parameter) or placement.offload_handle(parameter):
        return  # their storage is checked where it is made
    if parameter.dtype not in WRITTEN:
        raise ValueError(f"{name} is {parameter.dtype}, which cannot be trained; set requires_grad=False on it.")
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the model's weights first.")
    if parameter.is_inference():
        raise ValueError(f"{name} was made in torch.inference_mode(), so it cannot be written: load the model outside of it.")
    if parameter.layout != torch.strided or any(
        not stride and size > 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} has elements that share memory or none of their own, so it cannot be written: give it a copy "
            "(parameter.data = parameter.detach().to_dense().clone())."
        )


def _check_placement(model: nn.Module, method: Method, coordinate: Coordinate) -> None:
    """Refuse a quantized or offloaded weight that the method cannot train."""
    if quantized_linear.owner_of(coordinate.parameter) is not None and not isinstance(coordinate, LowRankCoordinate | CodeCoordinate):
        if is_computed(model):
            raise ValueError(WRITES.format(method.name))
        raise ValueError(f"{coordinate.name} is quantized, so it is trained by low-rank factors only: use lozo, or an adapter (PEFT).")
    if any(placement.offload_handle(tensor) is not None for tensor in coordinate.written()):
        raise ValueError(f"{method.name} writes quantized weights at each step, so they cannot be offloaded: leave offloading out.")
    handle = placement.offload_handle(coordinate.parameter)
    if handle is None:
        return
    if handle.lossy:
        raise ValueError(f"{coordinate.name} is stored in fewer bits while offloaded, so it cannot be trained: train an adapter (PEFT).")
    if not coordinate.supports_offload or method.svrg or method.projection:
        raise ValueError(f"{method.name} reads weights between evaluations, so they cannot be offloaded: use lozo, mezo or an adapter.")


def _takes_shards(method: Method, rule: Rule) -> bool:
    beyond = method.history or method.svrg or method.projection or method.own
    plain = rule.plain and not beyond and method.estimator in ("central", "forward")
    return plain and type(method.subspace) in (Full, LowRank)
