"""Zero-shot accuracy before and after `zotune prompt`, on rows that the search has not seen: mean ± std over seeds of the splits.

    python benchmarks/prompt_search.py --model src/zotune/bundled/tiny-lm --data_dir D --results benchmarks/results/prompts.jsonl

A task's training rows are cut three ways by seed: rows to search on, rows held out to choose by, rows that nothing sees before the end.
Searches on file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from zotune.prompting import PromptArguments, search
from zotune.tasks import load, load_rows
from zotune.training.arguments import ModelArguments
from zotune.training.quiet import quiet_libraries


def cell(args: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    return {"model": str(args.model), "task": task, "seed": seed, "search": args.num_search, "dev": args.num_dev, "unseen": args.num_unseen}


def found(args: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """The result of one search."""
    rows = list(load_rows(load(task), "train", args.data_dir))
    random.Random(f"{seed}/unseen").shuffle(rows)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for name, part in (("train", rows[args.num_unseen :]), ("unseen", rows[: args.num_unseen])):
            files[name] = Path(scratch) / f"{name}.jsonl"
            files[name].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        options = PromptArguments(
            task=task,
            output_dir=f"{scratch}/out",
            train_file=str(files["train"]),
            eval_file=str(files["unseen"]),
            num_search=args.num_search,
            num_dev=args.num_dev,
            truncate=True,
            seed=seed,
            use_cpu=True,
        )
        summary = search(ModelArguments(str(args.model)), options, print).summary
    kept = ("prompt", "options", "held_out", "evaluation", "sequences", "candidates", "templates", "every_template_on_every_row", "seconds")
    return {"cell": cell(args, task, seed), **{name: summary[name] for name in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec"])
    parser.add_argument("--num_search", type=int, default=256)
    parser.add_argument("--num_dev", type=int, default=256)
    parser.add_argument("--num_unseen", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    quiet_libraries()
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.is_file() else []
    known = {json.dumps(each["cell"], sort_keys=True): each for each in map(json.loads, lines)}
    table = ["| task | accuracy before | after | sequences to search | templates on all rows |", "|---|---|---|---|---|"]
    for task in args.tasks:
        results = []
        for seed in range(args.seeds):
            key = json.dumps(cell(args, task, seed), sort_keys=True)
            if key not in known:
                known[key] = found(args, task, seed)
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(known[key]) + "\n")
            results.append(known[key])
        before, after = (mean([100 * each["evaluation"][when] for each in results]) for when in ("before", "after"))
        first = results[0]
        table.append(f"| {task} | {before} | {after} | {first['sequences']['search']} | {first['every_template_on_every_row']} |")
    print("\n".join(table))


def mean(numbers: list[float]) -> str:
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.1f}{spread}"


if __name__ == "__main__":
    main()
