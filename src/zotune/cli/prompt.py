"""`zotune prompt`: search a task's prompt, its template and label words, before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from zotune.cli.console import new_console
from zotune.cli.parser import help_page
from zotune.cli.table import facts_table
from zotune.io.text import duration_text, metric_text
from zotune.prompting import PromptArguments, SearchResult, search
from zotune.training.arguments import ModelArguments
from zotune.training.option_parser import OptionParser
from zotune.training.quiet import quiet_libraries

USAGE = "zotune prompt --model_name_or_path MODEL --task TASK --output_dir DIR [--data_dir DIR] [options]"
ABOUT = (
    "Searches templates and label words of a task by their scores, keeps the best by held-out rows, and writes a task file that "
    "`zotune train --task` and `zotune eval --task` take. No weight changes."
)


def main(argv: Sequence[str]) -> int:
    """Runs `zotune prompt`."""
    quiet_libraries()
    parser = OptionParser((ModelArguments, PromptArguments), "zotune prompt")
    if {"-h", "--help", "--help-all"} & set(argv):
        searched = dict.fromkeys((field.name for field in dataclasses.fields(PromptArguments)), "")
        model = dict.fromkeys((field.name for field in dataclasses.fields(ModelArguments)), "")
        print(help_page(parser, USAGE, ABOUT, {"search": searched, "model": model | {"config": ""}}))
        return 0
    (model_arguments, args), _ = parser.parse(argv)
    console = new_console()
    result = search(model_arguments, args, lambda line: console.print(line, highlight=False, markup=False))
    console.print(facts_table(_facts(result), f"prompt of {args.task}"))
    return 0


def _facts(result: SearchResult) -> list[tuple[str, str]]:
    summary, metric = result.summary, result.summary["metric"]
    rows = [("prompt", repr(summary["prompt"])), ("options", ", ".join(map(repr, summary["options"])))]
    for part, name in (("held_out", "held-out"), ("evaluation", "evaluation")):
        if (found := summary[part]) is not None:
            change = f"{metric_text(metric, found['before'])} → {metric_text(metric, found['after'])}"
            rows.append((f"{metric}, {found['rows']} {name} rows", change))
    every = summary.get("every_template_on_every_row")
    rows.append(
        ("sequences", f"{summary['sequences']['search']} to search" + (f" (every template on every row: {every})" if every else ""))
    )
    return [*rows, ("time", duration_text(summary["seconds"])), ("task file", summary["file"])]
