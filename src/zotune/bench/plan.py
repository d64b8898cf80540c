"""From a grid to the command line of each of its runs, all checked by the parser of `zotune train` before the first starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune import bundled, tasks
from zotune.baselines import Baseline, catalog
from zotune.bench.grid import Budget, Entry, Grid, MethodEntry
from zotune.methods import AUTO, Method
from zotune.training import run_config
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
    model = str(options["model_name_or_path"])
    if model.startswith(_BUNDLED):
        options["model_name_or_path"] = str(bundled.path(model.removeprefix(_BUNDLED)))
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
    known: set[str | None] = set()
    parser = run_config.option_parser()
    for cell in itertools.chain.from_iterable(found.values()):
        run = Run(cell, grid.seeds[0])
        try:
            config = run_config.parse(words(run, Path("run"), data_dir), parser)
            task, model = str(config.data.task), config.model.model_name_or_path
            if task not in known:
                tasks.load(task)
                known.add(task)
            if models and model not in known:
                plan_model(config.model, "zotune bench")
                known.add(model)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{run.title}: {error}") from error
    return found


def spelled(value: Any) -> str:
    """A hyperparameter as text, such as `1e-06`."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict | list) else str(value)


# -- parts --------------------------------------------------------------------------------------------------------------------------


def _cells_of(
    grid: Grid, place: Place, model: Entry, task: Entry, scheme: Entry, method: MethodEntry, trains_nothing: bool
) -> Iterator[Cell]:
    fixed = {**DEFAULTS, **grid.options, **model.options, **task.options, **scheme.options, **method.options}
    count = 1
    for values in method.grid.values():
        count *= len(values)
    if count > 1 and trains_nothing:
        raise ValueError(f"{method.label} takes no steps, and nothing is held out for it to choose by: give it options, not a grid.")
    if count > 1 and not _number(fixed.get("num_dev")):
        raise ValueError(
            f"{method.label} has {count} cells, and no examples are held out to choose one by: set num_dev in `options`, such as 500."
        )
    for values in itertools.product(*method.grid.values()):
        tried = dict(zip(method.grid, (_read(value) for value in values), strict=True))
        options = {
            "model_name_or_path": model.name,
            "task": task.name,
            "method": method.name,
            "scheme": scheme.name,
            **{name: _read(value) for name, value in (fixed | tried).items()},
        }
        if not trains_nothing:
            options["max_steps"] = _steps(method, grid.budget if method.budget is None else method.budget, options)
        else:
            for name in ("eval_steps", "save_steps", "save_total_limit"):
                options.pop(name, None)
        yield Cell(place, tried, options)


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


def _read(value: Any) -> Any:
    """The value of a number with an exponent and without a point, such as `1e-6`, which YAML reads as a text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
