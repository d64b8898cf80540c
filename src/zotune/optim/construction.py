"""Construction of a run from a model and a method, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from zotune.forward.model import PerturbedForward
from zotune.methods import Method
from zotune.methods.estimators import ESTIMATORS
from zotune.methods.rules import Rule
from zotune.optim.calibration import layer_scales
from zotune.optim.calibration.calibrator import Calibrator
from zotune.optim.context import SampleBatches
from zotune.optim.distributed.workers import Workers
from zotune.optim.evaluator import Evaluator
from zotune.optim.guided import Guidance
from zotune.optim.run_parts import RunParts
from zotune.optim.state import RunState
from zotune.optim.step_transforms import transforms_of
from zotune.optim.svrg import Anchor
from zotune.rng import sparse_directions
from zotune.subspaces import Full, Guided, LowRank, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate
from zotune.weights import placement, quantized_linear
from zotune.weights.external_linear import held_elsewhere


def parameter_groups(model: nn.Module, params: Iterable[Any] | None, weight_decay: float) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them; weight decay is for matrices, unless the groups are given.

    Raises:
        ValueError: nothing is trainable.
    """
    if params is not None:
        given = list(params)
        if given and isinstance(given[0], dict):
            return [{"weight_decay": weight_decay, **group, "params": list(group["params"])} for group in given]
        trainable = given
    else:
        trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on those that should move.")
    if not weight_decay:
        return [{"params": trainable}]
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
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
) -> RunParts:
    """The parts of a run; ``measured``: the learning rate is.

    Raises:
        ValueError: the method cannot train this model, or the model is being trained by another optimizer.
    """
    groups = [_coordinates(model, method, rule, group) for group in param_groups]
    coordinates = [c for group in groups for c in group]
    method = dataclasses.replace(method, blocks=method.subspace.attach(model, coordinates))
    estimator = ESTIMATORS[method.estimator]
    layers = _scaled_layers(method, coordinates)
    directions = sparse_directions.directions(method.direction, {c.name: c.shape for c in coordinates})
    anchor = Anchor(method.anchoring) if method.anchoring else None
    state = RunState(seed, groups, math.nan if isinstance(method.eps, str) else method.eps)
    forward = PerturbedForward(model, coordinates, directions)
    try:
        evaluator = Evaluator(forward, method, estimator, forward_batching, state, workers, cuda_graphs)
        unknown_eps = math.isnan(state.eps)
        scale = sum(c.lr_scale * c.parameter.numel() for c in coordinates) / max(1, sum(c.parameter.numel() for c in coordinates))
        calibrator = Calibrator(forward, method, rule, scale, unknown_eps, measured) if measured or unknown_eps else None
        subspace = method.subspace
        guidance = Guidance(forward, evaluator, rule, subspace.interval, measured) if isinstance(subspace, Guided) else None
    except ValueError:
        forward.detach()
        raise
    transforms = transforms_of(method, evaluator, estimator, anchor, state)
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
        transforms=transforms,
        workers=workers,
        calibrator=calibrator,
        guidance=guidance,
        anchor=anchor,
        sample_batches=sample_batches,
        state=state,
    )


def _scaled_layers(method: Method, coordinates: list[Coordinate]) -> list[list[LowRankCoordinate]]:
    subspace = method.subspace
    if not (isinstance(subspace, LowRank) and subspace.layer_scales):
        return []
    return layer_scales.layers([c for c in coordinates if isinstance(c, LowRankCoordinate)])


def _coordinates(model: nn.Module, method: Method, rule: Rule, group: dict[str, Any]) -> list[Coordinate]:
    """What is trained of a parameter group."""
    names = {id(p): name for name, p in model.named_parameters()}
    if group["weight_decay"] and not rule.takes_weight_decay:
        raise ValueError(f"the update rule {rule.cls.__name__} has no weight decay; set weight_decay=0.")
    coordinates = []
    for parameter in group["params"]:
        name = names.get(id(parameter))
        if name is None:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not one of the model's own parameters.")
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}, which cannot be trained; set requires_grad=False on it.")
        if placement.is_sharded(parameter) and not _takes_shards(method, rule):
            raise ValueError(
                f"{name} is sharded, and {method.name} cannot train shards: take a method that moves full weights or low-rank "
                "ones by plain SGD, with directions_per 'batch' (mezo, lozo)."
            )
        if held_elsewhere(parameter):
            raise ValueError(
                f"{name} is held in few bits by another library, which cannot be written: call zotune.weights.external_linear.hold(model) and "
                "take a low-rank method (lozo), or train an adapter (PEFT)."
            )
        coordinate = method.subspace.coordinate(name, parameter)
        _check_placement(method, coordinate)
        coordinates.append(coordinate)
    return coordinates


def _check_placement(method: Method, coordinate: Coordinate) -> None:
    """Refuse a quantized or offloaded weight that the method cannot train."""
    if quantized_linear.owner_of(coordinate.parameter) is not None and not isinstance(coordinate, LowRankCoordinate):
        raise ValueError(f"{coordinate.name} is held in few bits, so it moves by low-rank factors only: use lozo, or an adapter (PEFT).")
    home = placement.home(coordinate.parameter)
    if home is None:
        return
    if home.rounds:
        raise ValueError(f"{coordinate.name} is kept in fewer bits while it is away, so it cannot be trained: train an adapter (PEFT).")
    if not coordinate.travels or method.anchoring is not None:
        raise ValueError(f"{method.name} reads weights between evaluations, so they cannot be offloaded: use lozo, mezo or an adapter.")


def _takes_shards(method: Method, rule: Rule) -> bool:
    plain = rule.plain and not (method.replayed or method.anchoring or method.own) and method.estimator in ("central", "forward")
    return plain and type(method.subspace) in (Full, LowRank)
