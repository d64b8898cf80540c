"""Protocols from the package's YAML files: rules that set options by kind of model, task, scheme and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from zotune.baselines import Baseline, catalog
from zotune.io import safe_yaml
from zotune.io.suggest import did_you_mean
from zotune.tasks import loader

#: A value of `num_dev`: as many held-out examples of each class as are trained on.
PER_CLASS = "k_shot per class"
#: A given option -> the protocol's that it stands in the place of.
INSTEAD = {
    "num_train_epochs": ("max_steps",),
    "max_steps": ("num_train_epochs",),
    "k_shot": ("num_train",),
    "num_train": ("k_shot",),
    "objective": ("loss_over",),
    "reward": ("objective", "loss_over"),
}


@dataclass(frozen=True)
class Place:
    """What a run is of.

    Attributes:
        model: ``"decoder"`` (a causal language model) or ``"encoder"``.
        family: `model_type` of its configuration, such as ``"opt"``; None: unknown.
        task: name of a task; None: data of one's own.
        scheme, method: names.
    """

    model: str
    family: str | None
    task: str | None
    scheme: str
    method: str

    @property
    def kind(self) -> str:
        """``"zeroth-order"``, or of a baseline ``"backward"``, ``"evaluate"`` or ``"fit"``."""
        chosen = catalog.get(self.method)
        return chosen.kind if isinstance(chosen, Baseline) else "zeroth-order"


@dataclass(frozen=True)
class Rule:
    """Options that hold where all facts of ``where`` and none of ``unless`` are true; a fact has one of several values."""

    where: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    note: str | None = None
    refuse: str | None = None

    def holds(self, facts: Mapping[str, Any]) -> bool:
        return all(facts.get(name) in _several(values) for name, values in self.where.items()) and not any(
            facts.get(name) in _several(values) for name, values in self.unless.items()
        )


@dataclass(frozen=True)
class Settings:
    """What a protocol says of a place.

    Attributes:
        options: of `zotune train`.
        grid: option -> values that were tried.
        notes: what it does not say, for the log.
    """

    options: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """A paper's settings.

    Attributes:
        name, title, source: of the paper and its code.
        method: where none is given.
        rules: in order; a later one overrides an earlier one.

    Example:
        >>> protocol = load("mezo")
        >>> settings = protocol.settings(Place("decoder", "opt", "copa", "full", "mezo"))
        >>> settings.options["objective"], settings.options["num_dev"], settings.grid
        ('lm', 100, {'learning_rate': [1e-06, 1e-07]})
    """

    name: str
    title: str
    source: str
    method: str
    rules: tuple[Rule, ...]

    def settings(self, place: Place, given: Mapping[str, Any] | None = None) -> Settings:
        """The options and the grid of a place.

        Args:
            place: what is run.
            given: options that are given and override the protocol's; those that depend on them follow.

        Raises:
            ValueError: the protocol has no settings there; the message says what it has.
        """
        given = {} if given is None else given
        options: dict[str, Any] = {} if given.get("method") else {"method": self.method}
        grid: dict[str, Sequence[Any]] = {}
        notes: list[str] = []
        facts = {name: getattr(place, name) for name in ("model", "family", "task", "scheme", "method", "kind")}
        for rule in self.rules:
            if not rule.holds({**facts, "objective": given.get("objective") or options.get("objective")}):
                continue
            if rule.refuse is not None:
                raise ValueError(f"the protocol {self.name} {rule.refuse}.")
            options |= rule.set
            grid |= rule.grid
            notes += [] if rule.note is None else [f"the protocol {self.name} {rule.note}"]
        replaced = {name for option, names in INSTEAD.items() if given.get(option) is not None for name in names}
        options = {name: value for name, value in options.items() if value is not None and name not in replaced}
        if options.get("num_dev") == PER_CLASS:
            assert place.task is not None, "the protocols name the tasks that have classes"
            shots = given.get("k_shot") or options.get("k_shot")
            classes = len(loader.load(place.task).labels)
            options |= {"num_dev": int(shots) * classes if shots else int(given["num_train"])}
        if facts["kind"] in ("zeroth-order", "backward") and "learning_rate" not in options.keys() | given.keys():
            notes.append(f"the protocol {self.name} has no rate of {place.method} with the scheme {place.scheme}: zotune's is taken")
        return Settings(options, grid, tuple(notes))


def names() -> list[str]:
    """Names of the protocols."""
    folder = resources.files("zotune.training.protocols")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


@cache
def load(name: str) -> Protocol:
    """The protocol of a name; ValueError with the nearest where there is none."""
    if name not in names():
        raise ValueError(f"unknown protocol {name!r}{did_you_mean(name, names())} (there are {', '.join(names())}).")
    text = (resources.files("zotune.training.protocols") / f"{name}.yaml").read_text(encoding="utf-8")
    content = safe_yaml.parse(text, f"protocol {name}")
    rules = tuple(Rule(**_numbers(each)) for each in content["rules"])
    if "extends" in content:
        rules = (*load(content["extends"]).rules, *rules)
    return Protocol(name, content["title"], content["source"], content["method"], rules)


def _several(values: Any) -> Sequence[Any]:
    if not isinstance(values, list):
        return (values,)
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def _numbers(value: Any) -> Any:
    """The value with numbers such as `1e-6`, which YAML reads as texts, as numbers."""
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return safe_yaml.number(value)
