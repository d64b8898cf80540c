"""`zotune methods` and `zotune tasks`: the list, or the description of one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from zotune.cli.table import wide_table
from zotune.io.suggest import did_you_mean


def methods(argv: Sequence[str]) -> int:
    """Runs `zotune methods [NAME]`."""
    name = _one_name(argv, "zotune methods [NAME]", "Lists the methods, or describes one: its equations, options and defaults.")
    if name is None:
        return 0
    from zotune import methods as registry

    if name:
        _describe_method(name)
        return 0
    chosen = registry.default().name
    rows = []
    for each in registry.names():
        method = registry.get(each)
        name = each + (" *" if each == chosen else "")
        rates = (f"{method.lr:g}", f"{method.eps:g}")
        rows.append((name, method.title, method.arxiv, method.forwards_text, method.extra_memory, *rates))
    print(wide_table(("name", "title", "arXiv", "forwards per step", "extra memory", "lr", "eps"), rows))
    print("* the default of `zotune train`. W: the trained weights; r: rank; m, n: sides of a matrix.\n")
    print("Baselines, on the same data and in the same report (a backward pass counts as two forwards, states are float32):")
    print(_baselines())
    print("The learning rates are the papers', for models of a billion parameters and more; small models want far larger ones.")
    print("`zotune methods NAME` describes one, with its options.")
    return 0


def _baselines() -> str:
    from zotune import baselines

    rows = []
    for each in baselines.names():
        baseline = baselines.get(each)
        rate = "–" if baseline.lr is None else f"{baseline.lr:g}"
        cost = str(baseline.forwards_per_step) if baseline.kind == "backward" else "no steps"
        options = ", ".join(option for option in baselines.options_of(each) if option != "lr")
        rows.append((each, baseline.title, baseline.arxiv or "–", cost, baseline.memory, rate, options))
    return wide_table(("name", "title", "arXiv", "forwards per step", "extra memory", "lr", "options"), rows)


def _describe_method(name: str) -> None:
    from zotune.baselines import catalog
    from zotune.methods import Method, base_of
    from zotune.optim.calibration.gains import measurable

    method = catalog.get(name)
    source = f"  (arXiv:{method.arxiv}, https://arxiv.org/abs/{method.arxiv})" if method.arxiv else ""
    print(f"{method.name}{source}\n")
    print(inspect.getdoc(catalog.recipe(name)))
    if (base := base_of(name)) is not None:
        print(f"\nA variant of {base}: the same options, one choice fixed.")
    options = catalog.options_of(name)
    if options:
        print("\noptions and defaults:")
    for option, default in options.items():
        print(f"  {option:<16}{_plain(default)}")
    forwards = method.forwards_text if isinstance(method, Method) else method.forwards_per_step
    print(f"\nforward passes per step: {forwards}; memory beyond the weights: {method.extra_memory}")
    if isinstance(method, Method) and not measurable(method):
        print("its learning rate cannot be measured; the default above holds unless --learning_rate is given")


def tasks(argv: Sequence[str]) -> int:
    """Runs `zotune tasks [NAME]`."""
    name = _one_name(argv, "zotune tasks [NAME]", "Lists the tasks, or describes one: its templates, options, columns and data.")
    if name is None:
        return 0
    from zotune import tasks as registry

    if name:
        _describe_task(registry.load(name), name)
        return 0
    rows = []
    for each in registry.names():
        task = registry.load(each)
        options = "generated" if task.generation else "the row's" if task.candidates else str(len(task.options))
        templates = ", ".join(name + (" *" if name == task.template else "") for name in task.templates)
        rows.append((each, task.title, options, templates, ", ".join(task.metrics)))
    print(wide_table(("name", "title", "options", "templates", "metrics"), rows))
    print("* the default template. `zotune tasks NAME` shows prompts, answer options and columns.")
    return 0


def _describe_task(task: Any, name: str) -> None:
    from zotune import tasks as registry

    print(f"{task.name}: {task.title}")
    if task.citation:
        print(task.citation)
    source = " ".join(filter(None, (task.hub, task.subset)))
    print(f"\nhub data set: {source or 'none'}; locally <data_dir>/{task.name}/<split>.jsonl[.gz]")
    print(f"splits: {', '.join(f'{use} from {split}' for use, split in task.splits.items())}")
    if task.gold:
        how = f"chosen from {task.candidates!r}" if task.candidates else f"generated, at most {task.max_new_tokens} tokens"
        print(f"columns: {', '.join(task.columns)}; answers in {'.'.join(task.gold)!r}, {how}")
    else:
        print(f"columns: {', '.join(task.columns)}; label in {task.label_column!r}: ", end="")
        print(", ".join(f"{value} {label}" for value, label in zip(task.labels, task.label_names, strict=True)))
    print(f"metrics: {', '.join(task.metrics)}\n\ntemplates (--template NAME, or a text of your own):")
    for template in task.templates:
        one = registry.load(name, template=template)
        print(f"  {template}{' *' if template == task.template else ''}")
        print(f"    prompt   {one.prompt!r}")
        print(f"    {'answer ' if one.gold else 'options'}  {', '.join(map(repr, one.options))}")


def _one_name(argv: Sequence[str], usage: str, about: str) -> str | None:
    """The name on the command line, "" for the list, None after printing the help."""
    if {"-h", "--help"} & set(argv):
        print(f"usage: {usage}\n\n{about}")
        return None
    for word in argv:
        if word.startswith("-"):
            raise ValueError(f"unknown option {word!r}{did_you_mean(word, ['--help'])} (usage: {usage}).")
    if len(argv) > 1:
        raise ValueError(f"one name at a time (usage: {usage}).")
    return argv[0] if argv else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
