"""What a run is beside its weights: its state for a checkpoint, and its header for a journal."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.io import version
from zotune.io.typed import are_groups, is_like, read_fields
from zotune.methods import AUTO
from zotune.optim.construction import RunParts
from zotune.optim.journal_records import FORMAT
from zotune.subspaces import LowRankCoordinate
from zotune.weights.digest import digest

#: Of what :func:`save` returns; a state of another version is refused.
VERSION = 2


@dataclass
class Numbers:
    """The numbers of a saved state; the entries that depend on the method are objects."""

    version: int
    method: str
    options: dict[str, Any]
    seed: int
    steps: int
    forward_passes: int
    sequences_evaluated: int
    nonfinite_in_a_row: int
    prepared: bool
    eps: float | None
    step_size: dict[str, Any] | None
    output_gradients: dict[str, Any] | None
    scales: list[float]
    forward_batching: str
    batched: bool | None
    rowwise: bool | None
    by_block: list[str]
    general_path: list[str]
    rule: dict[str, dict[str, Any]]
    transforms: dict[str, dict[str, Any]]
    anchor: str | None = None
    privacy: dict[str, Any] | None = None


def _check_types(run: RunParts, state_dict: Mapping[str, Any]) -> None:
    """ValueError where an entry of a saved state has another type than this run's."""
    numbers, groups = state_dict["zotune"], state_dict["param_groups"]
    read_fields(Numbers, numbers, "the saved state")
    samples = {
        "step_size": None if run.calibrator is None else run.calibrator.state(),
        "output_gradients": None if run.output_gradients is None else run.output_gradients.state(),
        "transforms": {transform.name: transform.state() for transform in run.transforms if transform.name},
    }
    wrong = [name for name, sample in samples.items() if numbers[name] is not None and not is_like(numbers[name], sample)]
    wrong += [name for name in ("steps", "forward_passes", "sequences_evaluated", "nonfinite_in_a_row") if numbers[name] < 0]
    wrong += ["scales"] if len(numbers["scales"]) != len(run.layers) else []
    wrong += [] if run.forward.by_block.knows(numbers["by_block"]) else ["by_block"]
    if not are_groups(groups):
        wrong.append("param_groups")
    if wrong:
        raise ValueError(f"the saved state is damaged, its {wrong[0]!r} is none of such a run.")


def save(run: RunParts, without: Collection[str] = ()) -> dict[str, Any]:
    """See :meth:`ZerothOrder.state_dict`; ``without`` the tensors of the named coordinates."""
    state = run.state
    tensors = coordinate_tensors(run, [name for name in run.state.by_name() if name not in without])
    rule_tensors, rule_others = run.rule.state()
    tensors |= {f"rule/{path}": tensor for path, tensor in rule_tensors.items()}
    for transform in run.transforms:
        tensors |= {f"transform/{transform.name}/{name}": tensor for name, tensor in transform.tensors().items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in run.param_groups]
    numbers = {
        "version": VERSION,
        "method": run.method.name,
        "options": _plain(run.method.options),
        "seed": state.seed,
        "steps": state.steps,
        "forward_passes": state.forward_passes,
        "sequences_evaluated": state.sequences_evaluated,
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
        "prepared": state.prepared,
        "eps": None if math.isnan(state.eps) else state.eps,
        "step_size": None if run.calibrator is None else run.calibrator.state(),
        "output_gradients": None if run.output_gradients is None else run.output_gradients.state(),
        "scales": [layer[0].scale for layer in run.layers],
        "forward_batching": run.evaluator.requested,
        "batched": run.evaluator.batched,
        "rowwise": run.evaluator.rowwise,
        "by_block": run.forward.by_block.names,
        "general_path": [n for n, c in run.state.by_name().items() if isinstance(c, LowRankCoordinate) and not c.uses_hook],
        "rule": rule_others,
        "transforms": {transform.name: transform.state() for transform in run.transforms if transform.name},
    }
    if run.private is not None:
        numbers["privacy"] = run.private.state()
    if _anchored(run) and run.anchor is not None:
        numbers["anchor"] = _anchored(run)
        tensors |= {f"anchor/{name}": tensor for name, tensor in run.anchor.tensors().items()}
    return {"state": tensors, "param_groups": groups, "zotune": numbers}


def coordinate_tensors(run: RunParts, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of some coordinates, by the names that they have in a state."""
    coordinates = run.state.by_name()
    return {f"coordinate/{name}/{entry}": tensor for name in names for entry, tensor in coordinates[name].state().items()}


def restore(run: RunParts, state_dict: Mapping[str, Any]) -> None:
    """See :meth:`ZerothOrder.load_state_dict`."""
    numbers, state = state_dict.get("zotune"), run.state
    if not isinstance(numbers, Mapping):
        raise ValueError("this is not the state of a ZerothOrder optimizer; load the one that was saved with the model.")
    if numbers.get("version") != VERSION:
        raise ValueError("this state was saved by another version of zotune and cannot be continued; start the run anew.")
    here: dict[str, Any] = {"method": run.method.name, "options": _plain(run.method.options), "seed": state.seed}
    for key, value in here.items():
        if numbers.get(key) != value:
            raise ValueError(f"the saved run has {key} {numbers.get(key)!r} and this one {value!r}; continue with the saved one's.")
    _check_types(run, state_dict)
    if run.anchor is not None:
        saved = {path: tensor for path, tensor in state_dict["state"].items() if path.startswith("anchor/")}
        run.anchor.restore({path.removeprefix("anchor/"): tensor for path, tensor in saved.items()})
    if numbers.get("anchor") != _anchored(run):
        raise ValueError(
            "the saved run and this one do not decay toward the same weights: give anchor_decay as it was, and construct the optimizer on "
            "the weights that training began with, or pass them as its anchor."
        )
    if run.private is not None:
        run.private.restore(numbers.get("privacy"))
    elif numbers.get("privacy") is not None:
        raise ValueError("the saved run is private, and this one would continue it without noise: give its privacy, or start a new run.")
    if len(state_dict["param_groups"]) != len(run.param_groups):
        raise ValueError("the saved run has another number of parameter groups; construct the optimizer as it was then.")
    states: dict[str, dict[str, Tensor]] = {name: {} for name in run.state.by_name()}
    rule_tensors: dict[str, Tensor] = {}
    transform_tensors: dict[str, dict[str, Tensor]] = {}
    for path, tensor in state_dict["state"].items():
        kind, _, rest = path.partition("/")
        if kind == "anchor":
            continue
        if kind == "rule":
            rule_tensors[rest] = tensor
            continue
        if kind == "transform":
            owner, _, entry = rest.partition("/")
            transform_tensors.setdefault(owner, {})[entry] = tensor
            continue
        name, _, entry = rest.rpartition("/")
        if name not in states:
            raise ValueError(f"the saved run trains {name!r}, which this one does not; construct the optimizer as it was then.")
        states[name][entry] = tensor
    for group, saved in zip(run.param_groups, state_dict["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    state.steps = numbers["steps"]
    state.forward_passes = numbers["forward_passes"]
    state.sequences_evaluated = numbers["sequences_evaluated"]
    state.nonfinite_in_a_row = numbers["nonfinite_in_a_row"]
    state.prepared = numbers["prepared"]
    if run.method.eps == AUTO and numbers["eps"] is not None:
        state.eps = numbers["eps"]
    if run.calibrator is not None and numbers["step_size"] is not None:
        run.calibrator.restore(numbers["step_size"])
    if run.output_gradients is not None and numbers["output_gradients"]:
        run.output_gradients.restore(numbers["output_gradients"])
    if run.evaluator.requested in ("auto", numbers["forward_batching"]):
        run.evaluator.restore(numbers["batched"], numbers["rowwise"])
    run.forward.by_block.include(numbers["by_block"])
    for transform in run.transforms:
        if transform.name:
            transform.restore(numbers["transforms"][transform.name], transform_tensors.get(transform.name, {}))
    state.begun = state.steps - 1
    run.forward.disable_hooks(numbers["general_path"])
    for layer, scale in zip(run.layers, numbers["scales"], strict=True):
        for member in layer:
            member.scale = float(scale)
    for name, coordinate in run.state.by_name().items():
        coordinate.load_state(states[name], state.seed, state.steps)
    run.rule.load_state(rule_tensors, numbers["rule"], {name: c.value() for name, c in run.state.by_name().items()})


def header(run: RunParts, *, base: bool) -> dict[str, Any]:
    """See :meth:`ZerothOrder.header`."""
    versions = {"zotune": version.VERSION, "torch": torch.__version__, "python": platform.python_version()}
    versions |= {n: sys.modules[n].__version__ for n in ("transformers", "peft") if n in sys.modules}
    return {
        "format": FORMAT,
        "versions": versions,
        "device": sorted({device.type for device in run.forward.devices}),
        **({"base": digest(run.model)} if base else {}),
        "seed": run.state.seed,
        "method": run.method.name,
        "options": _plain(run.method.options),
        "eps": run.method.eps,
        **({} if run.private is None else {"privacy": run.private.privacy.public()}),
        "groups": [
            {
                "weight_decay": group["weight_decay"],
                **({"anchor_decay": group["anchor_decay"]} if group["anchor_decay"] else {}),
                "parameters": [[c.name, list(c.parameter.shape), str(c.parameter.dtype).removeprefix("torch.")] for c in coordinates],
            }
            for group, coordinates in zip(run.param_groups, run.state.coordinates, strict=True)
        ],
    }


def _anchored(run: RunParts) -> str | None:
    """The digest of the weights that the run decays toward; None where it does not."""
    decays = run.anchor is not None and any(coordinate.anchored for coordinate in run.forward.coordinates)
    return run.anchor.digest if decays and run.anchor is not None else None


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back."""
    return {
        key: list(value) if isinstance(value, tuple) else value.__name__ if isinstance(value, type) else value
        for key, value in options.items()
    }
