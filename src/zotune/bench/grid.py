"""Grid files: their content, checked before anything runs, with one sentence for every mistake."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.io import safe_yaml
from zotune.io.failures import LONGEST
from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened, shown
from zotune.training import protocols

#: Most runs of a grid.
MOST_RUNS = 10_000
#: The units of a run's budget.
BUDGETS = ("steps", "forward_passes", "sequences")
#: Options of `zotune train` that a key of the grid file sets.
OWN_OPTIONS = {
    "model_name_or_path": "models",
    "task": "tasks",
    "scheme": "schemes",
    "method": "methods",
    "seed": "seeds",
    "max_steps": "budget",
    "num_train_epochs": "budget",
    "protocol": "protocol",
}
_COMMAND_LINE_ONLY = ("trust_remote_code",)
_REFUSED = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "config")
_KEYS = ("title", "about", "protocol", "models", "tasks", "schemes", "methods", "seeds", "tune_seeds", "budget", "options", "published")
_METHOD_KEYS = ("method", "label", "options", "grid", "budget", "models", "tasks", "schemes")
_PUBLISHED_KEYS = ("source", "what", "model", "task", "scheme", "columns", "rows")


@dataclass(frozen=True)
class Entry:
    """One value of an axis: a model, a task or a scheme.

    Attributes:
        name: as on the command line.
        label: in tables.
        options: of `zotune train`, wherever this value is used.
    """

    name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """The length of a run in ``steps``, ``forward_passes`` (evaluations of a batch) or ``sequences`` (examples × points)."""

    kind: str
    amount: int


@dataclass(frozen=True)
class MethodEntry(Entry):
    """A method with its options and hyperparameter grid.

    Attributes:
        grid: option -> values; every combination is a cell.
        budget: in place of the grid file's.
        models, tasks, schemes: the labels that it is run with; None: all.
    """

    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    budget: Budget | None = None
    models: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    schemes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Published:
    """A published table for comparison.

    Attributes:
        source: with arXiv id.
        what: ``"score"``, in percent, or ``"memory"``, in gigabytes.
        model: its label in the grid.
        values: (task label, scheme label, method label) -> figure; for memory the task may be "".
    """

    source: str
    what: str
    model: str
    values: Mapping[tuple[str, str, str], float]


@dataclass(frozen=True)
class Grid:
    """A checked grid file.

    Attributes:
        title, about: of the report.
        models, tasks, schemes, methods: the axes.
        seeds: of the runs that are reported.
        tune_seeds: of the runs by which a method's cell is chosen.
        budget: of a run whose method has none of its own; None: the protocol's.
        options: of every run.
        protocol: a name of :mod:`zotune.training.protocols`, whose options and grids hold where the file gives none.
        published: tables for comparison.
    """

    title: str
    about: str
    models: tuple[Entry, ...]
    tasks: tuple[Entry, ...]
    schemes: tuple[Entry, ...]
    methods: tuple[MethodEntry, ...]
    seeds: tuple[int, ...]
    tune_seeds: tuple[int, ...]
    budget: Budget | None
    options: Mapping[str, Any]
    published: tuple[Published, ...] = ()
    protocol: str | None = None


def load(path: str | Path) -> Grid:
    """The grid of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or has a mistake; the message names its place and the fix.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no grid file {str(path)!r}.")
    content = safe_yaml.read(path, path)
    try:
        return parsed(content, title=path.stem)
    except ValueError as error:
        raise ValueError(shortened(f"{path}: {error}", LONGEST)) from error


def parsed(content: Any, title: str = "grid") -> Grid:
    """The grid of a parsed YAML document; ValueError at the first mistake."""
    content = _mapping(content, "the grid file", _KEYS)
    protocol = None if content.get("protocol") is None else protocols.load(_text(content["protocol"], "protocol")).name
    for key in ("models", "tasks", "methods", *(() if protocol else ("budget",))):
        if content.get(key) in (None, [], {}):
            raise ValueError(f"{key!r} is missing: {_WANTED[key]}.")
    models = _axis(content["models"], "models", "model")
    tasks = _axis(content["tasks"], "tasks", "task")
    schemes = _axis(content.get("schemes", ["full"]), "schemes", "scheme")
    axes = {"models": models, "tasks": tasks, "schemes": schemes}
    labels = {axis: [entry.label for entry in entries] for axis, entries in axes.items()}
    methods = tuple(_method(each, f"methods[{index}]", labels) for index, each in enumerate(_list(content["methods"], "methods")))
    seeds = _seeds(content.get("seeds", [0]), "seeds")
    tune_seeds = _seeds(content.get("tune_seeds", list(seeds[:1])), "tune_seeds")
    _check_number(methods, labels, max(len(seeds), len(tune_seeds)))
    _check_labels_differ(methods, labels)
    published = _list(content.get("published", []), "published")
    return Grid(
        title=_text(content.get("title", title), "title"),
        about=_text(content.get("about", ""), "about"),
        models=models,
        tasks=tasks,
        schemes=schemes,
        methods=methods,
        seeds=seeds,
        tune_seeds=tune_seeds,
        budget=None if content.get("budget") is None else _budget(content["budget"], "budget"),
        protocol=protocol,
        options=_options(content.get("options"), "options"),
        published=tuple(_published(each, f"published[{index}]", labels) for index, each in enumerate(published)),
    )


_WANTED = {
    "models": "a list of model folders or Hugging Face hub ids",
    "tasks": "a list of tasks (`zotune tasks` lists them) or of YAML files of your own",
    "methods": "a list of methods (`zotune methods` lists them)",
    "budget": "one of steps, forward_passes, sequences, such as `budget: {steps: 20000}`",
}


def _axis(value: Any, where: str, kind: str) -> tuple[Entry, ...]:
    entries = []
    for index, each in enumerate(_list(value, where)):
        here = f"{where}[{index}]"
        if isinstance(each, str):
            entries.append(Entry(each, _short(each)))
            continue
        each = _mapping(each, here, (kind, "label", "options"))
        name = _text(each.get(kind), f"{here}.{kind}")
        entries.append(
            Entry(name, _text(each.get("label", _short(name)), f"{here}.label"), _options(each.get("options"), f"{here}.options"))
        )
    twice = _twice([entry.label for entry in entries])
    if twice is not None:
        raise ValueError(f"{where}: {twice!r} is there twice; give one of them another `label`.")
    return tuple(entries)


def _short(name: str) -> str:
    """`facebook/opt-13b` as `opt-13b`, `my/task.yaml` as `task`, `bundled:tiny-lm` as `tiny-lm`."""
    return name.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1].removesuffix(".yaml").removesuffix(".yml") or name


def _method(value: Any, where: str, labels: Mapping[str, Sequence[str]]) -> MethodEntry:
    if isinstance(value, str):
        return MethodEntry(value, value)
    value = _mapping(value, where, _METHOD_KEYS)
    name = _text(value.get("method"), f"{where}.method")
    options, grid = _options(value.get("options"), f"{where}.options"), _options(value.get("grid"), f"{where}.grid")
    for option, tried in grid.items():
        here = f"{where}.grid.{option}"
        if not isinstance(tried, list) or not tried:
            raise ValueError(f"{here} is a list of values to try, such as [1e-6, 1e-7], not {shown(tried)}.")
        if _twice([repr(each) for each in tried]) is not None:
            raise ValueError(f"{here} has a value twice.")
        if option in options:
            raise ValueError(f"{where}: {option!r} is both in `options` and in `grid`: give it once.")
    only: dict[str, tuple[str, ...] | None] = {}
    for axis, known in labels.items():
        wanted = value.get(axis)
        only[axis] = None if wanted is None else tuple(_known(each, known, f"{where}.{axis}") for each in _list(wanted, f"{where}.{axis}"))
    return MethodEntry(
        name,
        _text(value.get("label", name), f"{where}.label"),
        options,
        grid,
        None if value.get("budget") is None else _budget(value["budget"], f"{where}.budget"),
        **only,
    )


def _check_number(methods: Sequence[MethodEntry], labels: Mapping[str, Sequence[str]], seeds: int) -> None:
    """Raises ValueError for more runs than :data:`MOST_RUNS`, before any is written out."""
    total = 0
    for method in methods:
        places = math.prod(len(getattr(method, axis) or known) for axis, known in labels.items())
        total += places * math.prod(map(len, method.grid.values())) * seeds
    if total > MOST_RUNS:
        raise ValueError(f"these are up to {total} runs, and at most {MOST_RUNS} are possible: split the grid.")


def _check_labels_differ(methods: Sequence[MethodEntry], labels: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError where two methods with one label share a cell of a table."""
    seen: set[tuple[str, str, str, str]] = set()
    for index, method in enumerate(methods):
        places = {
            (method.label, model, task, scheme)
            for model in method.models or labels["models"]
            for task in method.tasks or labels["tasks"]
            for scheme in method.schemes or labels["schemes"]
        }
        if places & seen:
            raise ValueError(f"methods[{index}]: {method.label!r} is there twice for the same task and scheme: give one another `label`.")
        seen |= places


def _options(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a mapping of options of `zotune train`, such as {{num_dev: 500}}, not {shown(value)}.")
    options = {str(key).replace("-", "_"): each for key, each in value.items()}
    for name in options:
        if name in OWN_OPTIONS:
            raise ValueError(f"{where}: {name!r} is set by the bench; it goes under `{OWN_OPTIONS[name]}`.")
        if name in _REFUSED:
            raise ValueError(f"{where}: {name!r} is set by the bench itself: leave it out.")
        if name in _COMMAND_LINE_ONLY:
            raise ValueError(f"{where}: {name!r} can be set on the command line only (--{name}), not by a file: leave it out.")
    return options


def _budget(value: Any, where: str) -> Budget:
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{where} is one of {', '.join(BUDGETS)} with a number, such as {{steps: 20000}}, not {shown(value)}.")
    ((kind, amount),) = value.items()
    kind = _known(kind, BUDGETS, where)
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 1:
        raise ValueError(f"{where}.{kind} is a whole number of at least 1, not {shown(amount)}.")
    return Budget(kind, amount)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = _list(value, where)
    if not seeds or any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in seeds):
        raise ValueError(f"{where} is a list of whole numbers, such as [0, 1, 2], not {shown(value)}.")
    if _twice(seeds) is not None:
        raise ValueError(f"{where}: {_twice(seeds)} is there twice.")
    return tuple(seeds)


def _published(value: Any, where: str, labels: Mapping[str, Sequence[str]]) -> Published:
    value = _mapping(value, where, _PUBLISHED_KEYS)
    source = _text(value.get("source"), f"{where}.source")
    what = _known(value.get("what", "score"), ("score", "memory"), f"{where}.what")
    models, tasks, schemes = (labels[axis] for axis in ("models", "tasks", "schemes"))
    model = _the_one(value, "model", models, where)
    columns = [_text(each, f"{where}.columns") for each in _list(value.get("columns", []), f"{where}.columns")]
    over_schemes = bool(columns) and columns[0] in schemes and columns[0] not in tasks
    for each in columns:
        _known(each, schemes if over_schemes else tasks, f"{where}.columns")
    if not columns and what == "score":
        raise ValueError(f"{where}: 'columns' is missing: the tasks (or schemes) that the figures of every row belong to.")
    task = _the_one(value, "task", tasks, where) if over_schemes else ""
    scheme = "" if over_schemes else _the_one(value, "scheme", schemes, where)
    values: dict[tuple[str, str, str], float] = {}
    rows = value.get("rows")
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{where}: 'rows' is missing: a mapping from a method's label to its figures.")
    for method, figures in rows.items():
        figures = figures if isinstance(figures, list) else [figures]
        if len(figures) != max(1, len(columns)):
            raise ValueError(f"{where}.rows: {method!r} has {len(figures)} figures for {max(1, len(columns))} columns.")
        for column, figure in zip(columns or [""], figures, strict=True):
            if figure is None:
                continue
            if isinstance(figure, bool) or not isinstance(figure, int | float) or not math.isfinite(figure):
                raise ValueError(f"{where}.rows: {method!r} has {figure!r}, which is not a number.")
            place = (task, column) if over_schemes else (column, scheme)
            values[(*place, str(method))] = float(figure)
    return Published(source, what, model, values)


def _the_one(value: Mapping[str, Any], key: str, known: Sequence[str], where: str) -> str:
    """The label under ``key``, by default the only one that exists."""
    if value.get(key) is not None:
        return _known(value[key], known, f"{where}.{key}")
    if len(known) > 1:
        raise ValueError(f"{where}: {key!r} is missing: which of {_listed(known)} are the figures of?")
    return known[0]


def _mapping(value: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a mapping with {', '.join(known)}, not {shown(value)}.")
    for key in value:
        if key not in known:
            raise ValueError(f"{where}: unknown key {shown(key)}{did_you_mean(str(key), known)} (there are {_listed(known)}).")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is a list, not {shown(value)}.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is missing." if value is None else f"{where} is a text, not {shown(value)}.")
    return value.strip()


def _known(value: Any, known: Sequence[str], where: str) -> str:
    if value not in known:
        raise ValueError(f"{where}: unknown {shown(value)}{did_you_mean(str(value), known)} (there are {_listed(known)}).")
    return value


def _twice(values: Sequence[Any]) -> Any | None:
    seen: set[Any] = set()
    return next((each for each in values if each in seen or seen.add(each)), None)  # type: ignore[func-returns-value]


def _listed(names: Sequence[str]) -> str:
    return shortened(", ".join(names), 400)
