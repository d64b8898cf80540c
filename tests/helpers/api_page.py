"""docs/reference/python_api.md, made from the docstrings: ``python tests/helpers/api_page.py`` writes it anew."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

from docs_pages import DOCS
from zotune import methods

PAGE = DOCS / "reference/python_api.md"
#: Modules of the page, with a line on what they are for.
MODULES = {
    "zotune": "The public names. Methods of the main classes are listed below.",
    "zotune.methods": "`get(name, **options)`, or a name with underscores ([methods](methods.md), [your own](../how-to/add_method.md)).",
    "zotune.baselines": "First-order methods and runs without training ([baselines](baselines.md)).",
    "zotune.objectives": "Losses per example ([add a loss](../how-to/add_loss.md)).",
    "zotune.tasks": "Rows, prompts, encoded examples, collators ([tasks](tasks.md)).",
    "zotune.training.schemes": "What is trained, also as `zotune.training.schemes` ([schemes](../how-to/lora_and_schemes.md)).",
    "zotune.training.sft": "TRL's `SFTTrainer` with forward passes only ([TRL](../how-to/other_loops.md#trl)).",
    "zotune.subspaces": "Coordinates and their map to the weights.",
    "zotune.forward.layers": "Layer types ([add a layer type](../how-to/add_layer_type.md)).",
    "zotune.weights.offload": "Models larger than memory ([big models](../how-to/big_models.md)).",
    "zotune.attribution": "Shares of training examples from a run's journal ([influence](../how-to/influence.md)).",
    "zotune.engines": "Inference engines and GGUF files ([GGUF](../how-to/gguf.md), [add an engine](../how-to/add_engine.md)).",
    "zotune.optim.distributed": "Several processes ([several machines](../how-to/several_machines.md)).",
    "zotune.optim.federated": "Clients that exchange journal records ([Flower](../how-to/other_loops.md#flower-federated)).",
    "zotune.prompting": "Search for a prompt by its scores ([prompts](../how-to/prompts.md)).",
    "zotune.memory": "Predicted and measured memory ([memory](../explanation/memory.md)).",
    "zotune.bundled": "The model and the data that come with the package.",
    "zotune.errors": "Exceptions to catch.",
}
#: Classes whose methods are listed.
CLASSES = ("ZerothOrder", "ZOTrainer", "Journal")
#: A call with more parameters is shown without them.
MOST = 14
HEAD = """# Python API

One line per public name, from its docstring. `help(zotune.ZerothOrder)` shows the arguments, shapes and errors.
Every name can be imported from the module of its section.
"""


def summary(item: Any) -> str:
    """The first sentence of a docstring, in Markdown."""
    text = inspect.getdoc(item) or ""
    line = " ".join(text.split("\n\n")[0].split())
    line = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", line).replace("``", "`")
    return line.replace("|", "\\|")


def call(name: str, item: Any) -> str:
    """A name with its parameters, without types and defaults."""
    if not callable(item) or (inspect.isclass(item) and issubclass(item, Exception)):
        return f"`{name}`"
    try:
        parameters = inspect.signature(item).parameters.values()
    except (TypeError, ValueError):
        return f"`{name}`"
    shown, keywords = [], False
    for each in parameters:
        if each.name.startswith("_") or each.name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and not keywords:
            shown, keywords = [*shown, "*"], True
        shown.append({each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "") + each.name)
        keywords = keywords or each.kind is each.VAR_POSITIONAL
    return f"`{name}({', '.join(shown) if len(shown) <= MOST else '...'})`"


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """The public names of a module: its ``__all__``, or what it defines; modules apart."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name for name, item in vars(module).items() if not name.startswith("_") and getattr(item, "__module__", "") == module.__name__
        ]
    found = [(name, getattr(module, name)) for name in sorted(names, key=str.lower)]
    recipes = methods.names() if module is methods else ()  # they have a page of their own
    return [(name, item) for name, item in found if not isinstance(item, ModuleType) and name.replace("_", "-") not in recipes]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, about in MODULES.items():
        module = importlib.import_module(name)
        lines += [f"## `{name}`", "", about, ""]
        rows = [(call(each, item), summary(item)) for each, item in public(module) if inspect.isclass(item) or inspect.isroutine(item)]
        others = [each for each, item in public(module) if not (inspect.isclass(item) or inspect.isroutine(item))]
        if rows:
            lines += ["| name | what |", "|---|---|", *(f"| {one} | {what} |" for one, what in rows), ""]
        if others:
            lines += ["Values: " + ", ".join(f"`{each}`" for each in others) + ".", ""]
        for owner, cls in public(module) if name == "zotune" else ():
            if owner not in CLASSES:
                continue
            lines += [f"### `{owner}`", "", "| member | what |", "|---|---|"]
            fields = {key: item for key, item in vars(cls).items() if not key.startswith("_") and (inspect.getdoc(item) or "")}
            lines += [f"| {call(key, unwrapped(item))} | {summary(item)} |" for key, item in fields.items() if documented(item)] + [""]
    return "\n".join(lines).rstrip() + "\n"


def unwrapped(item: Any) -> Any:
    """The function of a class method; None for what is not called."""
    return item.__func__ if isinstance(item, (classmethod, staticmethod)) else item if inspect.isroutine(item) else None


def documented(item: Any) -> bool:
    """Whether a class's member is a method or property with a docstring of its own."""
    return isinstance(item, (property, classmethod, staticmethod)) or inspect.isfunction(item)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
