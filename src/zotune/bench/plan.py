"""From a grid to the command line of each of its runs, all checked by the parser of `zotune train` before the first starts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune import bundled, tasks
from zotune.baselines import Baseline, catalog
from zotune.bench.grid import Budget, Entry, Grid, MethodEntry
from zotune.io.safe_yaml import number
from zotune.methods import AUTO, Method
from zotune.training import protocols, run_config
from zotune.training.loading import plan_model
from zotune.training.option_parser import option_words

#: Options that the grid file may override.
DEFAULTS: dict[str, Any] = {"eval_steps": 0.1, "save_steps": 0.25, "save_total_limit": 1}
#: Evaluations for measuring a learning rate: on the first batch, and per step after that (docs/how-to/learning_rate.md).
_MEASURING = (25, 3 / 20)
_BUNDLED = "bundled:"


@dataclass(frozen=True, order=True)
class Place:
    """A cell of the report's tables: the labels of model, task, scheme and method."""

    model: str
    task: str
    scheme: str
    method: str


@dataclass(frozen=True, eq=False)
class Cell:
    """A place with one choice of its hyperparameters; its runs differ in their seeds.

    Attributes:
        place: of its figures.
        tried: the hyperparameters from the method's grid.
        options: every option of `zotune train` except seed and folders.
    """

    place: Place
    tried: Mapping[str, Any]
    options: Mapping[str, Any]

    def key(self, seed: int) -> str:
        """The name of the run's folder, with a digest of all options."""
        facts = json.dumps({**self.options, "seed": seed}, sort_keys=True, default=str)
        words = [self.place.model, self.place.task, self.place.scheme, self.place.method]
        readable = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", word) for word in words)[:80]
        return f"{readable}_{hashlib.sha256(facts.encode()).hexdigest()[:10]}_s{seed}"


@dataclass(frozen=True)
class Run:
    """A cell under one seed."""

    cell: Cell
    seed: int

    @property
    def key(self) -> str:
        return self.cell.key(self.seed)

    @property
    def title(self) -> str:
        """Such as `mezo on sst2 (opt-13b, full), learning_rate 1e-06, seed 0`."""
        place = self.cell.place
        tried = "".join(f", {name} {spelled(value)}" for name, value in self.cell.tried.items())
        return f"{place.method} on {place.task} ({place.model}, {place.scheme}){tried}, seed {self.seed}"


def cells(grid: Grid) -> dict[Place, list[Cell]]:
    """The cells of every place, in the grid's order.

    Raises:
        ValueError: an unknown method; a hyperparameter grid without training, or without held-out examples to choose by.
    """
    found: dict[Place, list[Cell]] = {}
    for model, task, scheme, method in itertools.product(grid.models, grid.tasks, grid.schemes, grid.methods):
        place = Place(model.label, task.label, scheme.label, method.label)
        wanted = ((method.models, model), (method.tasks, task), (method.schemes, scheme))
        if any(only is not None and each.label not in only for only, each in wanted):
            continue
        trains_nothing = catalog.is_baseline(method.name) and _recipe(method, {}).kind != "backward"  # type: ignore[union-attr]
        if trains_nothing and (scheme.name != "full" or scheme.options):
            continue  # the untrained model has one row
        found[place] = list(_cells_of(grid, place, model, task, scheme, method, trains_nothing))
    return found


def runs_of(cell: Cell, seeds: Sequence[int]) -> list[Run]:
    """The cell under each seed."""
    return [Run(cell, seed) for seed in seeds]


def words(run: Run, folder: Path, data_dir: str | None) -> list[str]:
    """The words after `zotune train` that start a run, with all of its options, so that it can be repeated by hand."""
    options = {**run.cell.options, "seed": run.seed, "output_dir": str(folder)}
    options["model_name_or_path"] = _location(str(options["model_name_or_path"]))
    if data_dir is not None:
        options["data_dir"] = data_dir
    return [*itertools.chain.from_iterable(option_words(name, value) for name, value in options.items() if value is not None)]


def check(grid: Grid, data_dir: str | None, *, models: bool = True) -> dict[Place, list[Cell]]:
    """The cells of every place, their options checked by the parser of `zotune train`.

    Args:
        grid: the grid.
        data_dir: as in `zotune train`.
        models: also check that the models exist (those on the hub need the network).

    Raises:
        ValueError, FileNotFoundError: the first mistake, with the run that has it.
    """
    found = cells(grid)
    if not found:
        raise ValueError("there is nothing to run: every method is limited to models, tasks or schemes that do not meet.")
    known_tasks, known_models = set[str](), set[str]()  # those of the runs so far
    found_models = set[str | None]()
    checked = set[str]()  # options of runs, whatever the model
    parser = run_config.option_parser()
    for cell in itertools.chain.from_iterable(map(_differing, found.values())):
        run = Run(cell, grid.seeds[0])
        name = str(cell.options["model_name_or_path"])
        options = json.dumps({**cell.options, "model_name_or_path": None}, sort_keys=True, default=str)
        if options in checked and name in known_models:
            continue
        checked.add(options)
        known_models.add(name)
        try:
            config = run_config.parse(words(run, Path("run"), data_dir), parser)
            task, model = str(config.data.task), config.model.model_name_or_path
            if task not in known_tasks:
                tasks.load(task)
                known_tasks.add(task)
            if models and model not in found_models:
                plan_model(config.model, "zotune bench")
                found_models.add(model)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{run.title}: {error}") from error
    return found


def spelled(value: Any) -> str:
    """A hyperparameter as text, such as `1e-06`."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict | list) else str(value)


# -- parts --------------------------------------------------------------------------------------------------------------------------


def _differing(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that differ from the first one in one hyperparameter at most: all its values, without their combinations."""
    return [cell for cell in cells if sum(cell.tried[name] != value for name, value in cells[0].tried.items()) <= 1]


def _cells_of(
    grid: Grid, place: Place, model: Entry, task: Entry, scheme: Entry, method: MethodEntry, trains_nothing: bool
) -> Iterator[Cell]:
    given = {**grid.options, **model.options, **task.options, **scheme.options, **method.options}
    budget = method.budget or grid.budget
    fixed, tried_values = DEFAULTS | given, dict(method.grid)
    if grid.protocol is not None:
        settings = _settings(grid.protocol, given, model, task, scheme, method, budget)
        fixed = {"protocol": grid.protocol, **settings.options, **given}
        tried_values = {name: values for name, values in settings.grid.items() if name not in given} | tried_values
    count = math.prod(map(len, tried_values.values()))
    if count > 1 and trains_nothing:
        raise ValueError(f"{method.label} takes no steps, and nothing is held out for it to choose by: give it options, not a grid.")
    if count > 1 and not _number(fixed.get("num_dev")):
        raise ValueError(
            f"{method.label} has {count} cells, and no examples are held out to choose one by: set num_dev in `options`, such as 500."
        )
    for values in itertools.product(*tried_values.values()):
        tried = dict(zip(tried_values, (number(value) for value in values), strict=True))
        options = {
            "model_name_or_path": model.name,
            "task": task.name,
            "method": method.name,
            "scheme": scheme.name,
            **{name: number(value) for name, value in (fixed | tried).items()},
        }
        if not trains_nothing:
            if budget is not None:
                options["max_steps"] = _steps(method, budget, options)
        else:
            for name in ("eval_steps", "save_steps", "save_total_limit"):
                options.pop(name, None)
        yield Cell(place, tried, options)


def _settings(
    name: str, given: Mapping[str, Any], model: Entry, task: Entry, scheme: Entry, method: MethodEntry, budget: Budget | None
) -> protocols.Settings:
    """What a protocol says of a place of the grid."""
    protocol = protocols.load(name)
    place = protocols.place_of(protocol, _location(model.name), task.name, {**given, "scheme": scheme.name, "method": method.name})
    settings = protocol.settings(place, {**given, "method": method.name, **({"max_steps": 1} if budget else {})})
    return dataclasses.replace(
        settings, options={name: value for name, value in settings.options.items() if not budget or name != "max_steps"}
    )


def _location(model: str) -> str:
    return str(bundled.path(model.removeprefix(_BUNDLED))) if model.startswith(_BUNDLED) else model


def _steps(method: MethodEntry, budget: Budget, options: Mapping[str, Any]) -> int:
    """Steps within a budget; the evaluations for measuring the learning rate count."""
    if budget.kind == "steps":
        return budget.amount
    chosen = _recipe(method, options)
    passes = float(budget.amount)
    if budget.kind == "sequences":
        size = _number(options.get("per_device_train_batch_size", 16)) * _number(options.get("gradient_accumulation_steps", 1))
        passes /= max(1, size)
    per_step = float(chosen.forwards_per_step)
    if isinstance(chosen, Method) and options.get("learning_rate", AUTO) == AUTO:
        passes -= _MEASURING[0]
        per_step += _MEASURING[1]
    steps = int(passes / per_step)
    if steps < 1:
        raise ValueError(f"the budget of {budget.amount} {budget.kind} is less than one step of {method.label}: raise it.")
    return steps


def _recipe(method: MethodEntry, options: Mapping[str, Any]) -> Method | Baseline:
    known = catalog.options_of(method.name)
    given = {name: value for name, value in options.items() if name in known and value is not None}
    extra = options.get("method_args")
    return catalog.get(method.name, **{**given, **(extra if isinstance(extra, dict) else {})})


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
