"""`zotune methods` and `zotune tasks`: the list, or the description of one."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from zotune.cli.parser import CommandParser
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
    site = f"arXiv:{method.arxiv}, https://arxiv.org/abs/{method.arxiv}"
    if isinstance(method, Method) and "." not in method.arxiv:
        site = f"OpenReview, {method.url}"
    source = f"  ({site})" if method.arxiv else ""
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
    """Runs `zotune tasks [NAME]` and `zotune tasks --fetch NAME --data_dir DIR`."""
    parser = CommandParser(
        "zotune tasks",
        "Lists the tasks, or describes one: its templates, options, columns and data. With --fetch, writes a task's rows from the Hugging "
        "Face hub to the folder that the --data_dir of other commands reads.",
    )
    parser.add_argument("name", nargs="?", default="", help="the task to describe, or the path of a task file")
    parser.add_argument("--fetch", metavar="NAME", help="the task whose rows to write to <data_dir>/<task>/<split>.jsonl")
    parser.add_argument("--data_dir", help="the folder to write to; with NAME, the folder whose rows of the task to count and to digest")
    parser.add_argument("--num_train", type=int, help="most training rows, drawn by random.Random(0).sample (default: all)")
    parser.add_argument("--num_eval", type=int, help="most evaluation rows, drawn in the same way (default: all)")
    args = parser.parse(argv)
    from zotune import tasks as registry

    if args.fetch is not None:
        return _fetch(args)
    for option in ("num_train", "num_eval", *(() if args.name else ("data_dir",))):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} goes with --fetch (see `zotune tasks --help`).")
    if args.name:
        _describe_task(registry.load(args.name), args.name)
        if args.data_dir is not None:
            _describe_rows(registry.load(args.name), args.data_dir)
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


def _fetch(args: Namespace) -> int:
    from zotune import tasks as registry
    from zotune.tasks.fetch import fetch
    from zotune.training.quiet import quiet_libraries

    if args.data_dir is None:
        raise ValueError("--fetch needs --data_dir, the folder to write to (see `zotune tasks --help`).")
    if args.name:
        raise ValueError(f"--fetch takes one task: write `zotune tasks --fetch {args.fetch}` without {args.name!r}.")
    quiet_libraries()
    for found in fetch(registry.load(args.fetch), args.data_dir, args.num_train, args.num_eval):
        print(f"{found.path}: {found.rows} of {found.of} rows, digest {found.digest}")
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


def _describe_rows(task: Any, data_dir: str) -> None:
    from zotune.tasks.fetch import digest
    from zotune.tasks.sources import load_rows

    print()
    for use in task.splits:
        rows = load_rows(task, use, data_dir)
        print(f"{rows.source}: {len(rows)} rows, digest {digest(task, rows)}")


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
