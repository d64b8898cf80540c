"""What a run is made of beside the weights: its state for a checkpoint, and its header for a journal.

The functions behind ``ZerothOrder.state_dict``, ``load_state_dict`` and ``header``; they know the optimiser from inside.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune.coordinates import Coordinate
from zotune.journal import digest
from zotune.methods import AUTO
from zotune.replayed import Past
from zotune.subspaces import LowRankCoordinate

if TYPE_CHECKING:
    from zotune.optimizer import ZerothOrder


def save(optimizer: ZerothOrder, without: Collection[str] = ()) -> dict[str, Any]:
    """See :meth:`ZerothOrder.state_dict`; ``without`` the tensors of the named coordinates."""
    tensors = coordinate_tensors(optimizer, [name for name in _by_name(optimizer) if name not in without])
    rule_tensors, rule_others = optimizer.rule.state()
    tensors |= {f"rule/{path}": tensor for path, tensor in rule_tensors.items()}
    if optimizer.anchor is not None:
        tensors |= {f"anchor/{name}": tensor for name, tensor in optimizer.anchor.weights.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    run = {
        "method": optimizer.method.name,
        "options": _plain(optimizer.method.options),
        "seed": optimizer.seed,
        "steps": optimizer.steps,
        "forward_passes": optimizer.forward_passes,
        "sequences_evaluated": optimizer.sequences_evaluated,
        "nonfinite_in_a_row": optimizer._nonfinite_in_a_row,
        "prepared": optimizer._prepared,
        "eps": None if math.isnan(optimizer.eps) else optimizer.eps,
        "step_size": None if optimizer.calibrator is None else optimizer.calibrator.state(),
        "guidance": None if optimizer.guidance is None else optimizer.guidance.state(),
        "scales": [layer[0].scale for layer in optimizer.layers],
        "probe": optimizer.evaluations.choice,
        "batched": optimizer.evaluations.batched,
        "apart": optimizer.evaluations.apart,
        "general_path": [n for n, c in _by_name(optimizer).items() if isinstance(c, LowRankCoordinate) and not c.side_path],
        "rule": rule_others,
        "shaping": dict(optimizer.shaping_state),
        "anchor": None if optimizer.anchor is None else optimizer.anchor.numbers(),
        "past": [[past.step, list(past.coefficients)] for past in optimizer.past],
    }
    return {"state": tensors, "param_groups": groups, "zotune": run}


def coordinate_tensors(optimizer: ZerothOrder, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of some coordinates, by the names that they have in a state."""
    coordinates = _by_name(optimizer)
    return {f"coordinate/{name}/{entry}": tensor for name in names for entry, tensor in coordinates[name].state().items()}


def restore(optimizer: ZerothOrder, state_dict: Mapping[str, Any]) -> None:
    """See :meth:`ZerothOrder.load_state_dict`."""
    run = state_dict.get("zotune")
    if run is None:
        raise ValueError("this is not the state of a ZerothOrder optimizer; load the one that was saved with the model.")
    here: dict[str, Any] = {"method": optimizer.method.name, "options": _plain(optimizer.method.options), "seed": optimizer.seed}
    for key, value in here.items():
        if run[key] != value:
            raise ValueError(f"the saved run has {key} {run[key]!r} and this one {value!r}; continue with the saved one's.")
    if len(state_dict["param_groups"]) != len(optimizer.param_groups):
        raise ValueError("the saved run has another number of parameter groups; construct the optimizer as it was then.")
    states: dict[str, dict[str, Tensor]] = {name: {} for name in _by_name(optimizer)}
    rule_tensors = {}
    for path, tensor in state_dict["state"].items():
        kind, _, rest = path.partition("/")
        if kind == "rule":
            rule_tensors[rest] = tensor
            continue
        if kind == "anchor" and optimizer.anchor is not None:
            optimizer.anchor.weights[rest] = tensor.to(_by_name(optimizer)[rest].device, copy=True)
            continue
        name, _, entry = rest.rpartition("/")
        if name not in states:
            raise ValueError(f"the saved run trains {name!r}, which this one does not; construct the optimizer as it was then.")
        states[name][entry] = tensor
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    optimizer.steps = run["steps"]
    optimizer.forward_passes = run["forward_passes"]
    optimizer.sequences_evaluated = run["sequences_evaluated"]
    optimizer._nonfinite_in_a_row = run["nonfinite_in_a_row"]
    optimizer._prepared = run["prepared"]
    if optimizer.method.eps == AUTO and run["eps"] is not None:
        optimizer.eps = optimizer.evaluations.eps = run["eps"]
    if optimizer.calibrator is not None and run["step_size"] is not None:
        optimizer.calibrator.restore(run["step_size"])
    if optimizer.guidance is not None and run.get("guidance"):
        optimizer.guidance.restore(run["guidance"])
    if optimizer.evaluations.choice in ("auto", run.get("probe")):
        optimizer.evaluations.restore(run.get("batched"), run.get("apart"))
    optimizer.shaping_state = dict(run.get("shaping", {}))
    optimizer.past = [Past(step, tuple(coefficients)) for step, coefficients in run.get("past", [])]
    if optimizer.anchor is not None and run.get("anchor"):
        optimizer.anchor.sums, optimizer.anchor.count = list(run["anchor"]["sums"]), run["anchor"]["count"]
    optimizer._begun = optimizer.steps - 1
    optimizer.probe.distrust(run["general_path"])
    for layer, scale in zip(optimizer.layers, run.get("scales", ()), strict=True):
        for member in layer:
            member.scale = float(scale)
    for name, coordinate in _by_name(optimizer).items():
        coordinate.load_state(states[name], optimizer.seed, optimizer.steps)
    optimizer.rule.load_state(rule_tensors, run["rule"], {name: c.value() for name, c in _by_name(optimizer).items()})


def header(optimizer: ZerothOrder, *, base: bool) -> dict[str, Any]:
    """See :meth:`ZerothOrder.header`."""
    versions = {"zotune": _version(), "torch": torch.__version__, "python": platform.python_version()}
    versions |= {n: sys.modules[n].__version__ for n in ("transformers", "peft") if n in sys.modules}
    return {
        "format": 1,
        "versions": versions,
        "device": sorted({device.type for device in optimizer.probe.devices}),
        **({"base": digest(optimizer.model)} if base else {}),
        "seed": optimizer.seed,
        "method": optimizer.method.name,
        "options": _plain(optimizer.method.options),
        "eps": optimizer.method.eps,
        "groups": [
            {
                "weight_decay": group["weight_decay"],
                "parameters": [[c.name, list(c.parameter.shape), str(c.parameter.dtype).removeprefix("torch.")] for c in coordinates],
            }
            for group, coordinates in zip(optimizer.param_groups, optimizer.coordinates, strict=True)
        ],
    }


def _by_name(optimizer: ZerothOrder) -> dict[str, Coordinate]:
    return {c.name: c for group in optimizer.coordinates for c in group}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back."""
    return {
        key: list(value) if isinstance(value, tuple) else value.__name__ if isinstance(value, type) else value
        for key, value in options.items()
    }


def _version() -> str:
    from zotune import __version__

    return __version__
