"""What forward passes learn beside cheap backprop, at equal sequences, on six data sets.

    python benchmarks/frontier.py --data_dir data --results benchmarks/results/frontier.jsonl

Rows that need a rate have the best of one search on each data set (``methods_table.py`` says how), first-order rows too. ``lozo-g`` and
``lozo-e`` measure theirs within the run, which counts: nothing is tuned for them. One schedule, one order of examples, batches of 16; a
backward pass counts as two forwards. Three seeds; accuracy of up to 500 rows of the evaluation split, which no search has looked at; loss
of all training examples. Runs on file are not repeated, and the table is of what there is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from backprop import CHEAP
from methods_table import Runs, cell, last, mean, search

from zotune import bundled
from zotune.io.figures import new_figure, save_figure

#: Data set: classes, and the most tokens of a prompt, where long ones are left out of training.
TASKS = {"sst2": (2, None), "trec": (6, None), "ag_news": (4, 64), "mr": (2, 64), "sst5": (5, 64), "rte": (2, 96)}
#: Row: (method, scheme, whether its rate is measured in the run).
ROWS: dict[str, tuple[str, str, bool]] = {
    "`lozo-g` (default)": ("lozo-g", "full", True),
    "AdamW, LoRA": ("fo-adamw", "lora", False),
    "AdamW, all weights": ("fo-adamw", "full", False),
    "AdamW, last block": ("fo-adamw, last block", "full", False),
    "AdamW, output projections": ("fo-adamw, guided layers", "full", False),
    "`mezo`": ("mezo", "full", False),
    "`lozo-e`": ("lozo-e", "full", True),
    "`mezo`, LoRA": ("mezo", "lora", False),
    "BAdam": ("badam", "full", False),
    "AdaLomo": ("adalomo", "full", False),
}
assert set(CHEAP) <= {method for method, _, _ in ROWS.values()}


def settings(args: argparse.Namespace, task: str) -> argparse.Namespace:
    """The arguments of ``methods_table.cell`` for a data set."""
    classes, tokens = TASKS[task]
    shared = {"model": bundled.path("tiny-lm").relative_to(Path.cwd()), "data_dir": args.data_dir, "budget": args.budget, "num_train": 400}
    return argparse.Namespace(
        **shared,
        task=task,
        classes=classes,
        max_tokens=tokens,
        drawn=tokens is not None,
        num_dev=100,
        seeds=args.seeds,
        points=0,
        rates_of=None,
    )


def finals(runs: Runs, args: argparse.Namespace, task: str, row: str) -> tuple[float | str, list[dict[str, Any]]]:
    """The rate of a row, and its runs over the whole budget."""
    method, scheme, measured = ROWS[row]
    one = settings(args, task)
    if measured:
        rates: list[float | str] = ["auto"]
    else:
        tried = search(runs, one, method, scheme)
        best = min(tried, key=lambda rate: tried[rate])
        rates = [rate for rate in sorted(tried, reverse=True) if rate <= best]
    for rate in rates:
        found = []
        for seed in range(args.seeds):
            whole = cell(one, method, scheme, rate, seed, whole=True)
            found.append(runs.of(whole | {"score": "validation", "num_eval": 500}))
        if measured or rate == rates[-1] or all(last(r) <= tried[float(rate)] for r in found):
            return rate, found
    raise AssertionError("the lowest rate is taken")


def row_of(args: argparse.Namespace, wanted: tuple[str, str]) -> tuple[str, str, float | str, list[dict[str, Any]]]:
    task, row = wanted
    rate, found = finals(Runs(args.results, *args.searched), args, task, row)
    print(f"{task} {row} {rate}: {mean([last(r) for r in found])}; {mean([100 * r['accuracy'] for r in found], 1)}", flush=True)
    return task, row, rate, found


#: Rows of the figure: their label and color, and what they are called in ``frontier_memory.py``.
SHOWN = {
    "`lozo-g` (default)": ("lozo-g (default)", "#c8341a", ["lozo-g (default)"]),
    "AdamW, LoRA": ("AdamW, LoRA", "#88c8ee", ["AdamW, LoRA", "AdamW, LoRA, checkpointing"]),
    "AdamW, all weights": ("AdamW, all weights", "#9a9a9a", ["AdamW, all"]),
    "`mezo`": ("MeZO", "#e0a526", []),
}
MEMORY, MODEL = Path(__file__).parent / "results/frontier_memory.json", "meta-llama/Llama-2-7b-hf"
NAMES = {"sst2": "SST-2", "trec": "TREC", "ag_news": "AG News", "mr": "MR", "sst5": "SST-5", "rte": "RTE"}


def draw(made: dict[tuple[str, str], tuple[float | str, list[dict[str, Any]]]], tasks: list[str], path: Path) -> None:
    """Accuracy on each set, and the memory of a 7B model beyond a forward pass by length of a sequence."""
    figure, ((left, right),) = new_figure(1, 2, (11.5, 3.8))
    rows = [row for row in SHOWN if all((task, row) in made for task in tasks)]
    for place, row in enumerate(rows):
        label, color, _ = SHOWN[row]
        numbers = [[100 * r["accuracy"] for r in made[task, row][1]] for task in tasks]
        x = [at + (place - (len(rows) - 1) / 2) * 0.8 / len(rows) for at in range(len(tasks))]
        bars = {"width": 0.75 / len(rows), "color": color, "label": label, "yerr": [statistics.stdev(each) for each in numbers]}
        left.bar(x, [statistics.fmean(each) for each in numbers], error_kw={"linewidth": 0.8}, **bars)
    left.set(xticks=range(len(tasks)), xticklabels=[NAMES[task] for task in tasks], ylabel="accuracy, %")
    left.set_title("2,400 sequences of a 7M model, three seeds", fontsize="medium")
    found: dict[str, float] = json.loads(MEMORY.read_text())
    for label, color, names in SHOWN.values():
        for name in names:
            lengths = sorted(int(key.rpartition(", ")[2]) for key in found if key.startswith(f"{MODEL}, {name}, ") and _is_row(key, name))
            sizes = [found[f"{MODEL}, {name}, {n}"] - found[f"{MODEL}, forward pass, {n}"] for n in lengths]
            right.plot(
                lengths, sizes, color=color, marker="o", markersize=3, linestyle="--" if "check" in name else "-", label=name or label
            )
    right.set(xscale="log", yscale="log", ylim=(None, 3e3), xlabel="tokens of a sequence", ylabel="GB beyond a forward pass (predicted)")
    right.set_title("Llama-2-7B, one sequence", fontsize="medium")
    right.set_xticks(lengths, [str(n) for n in lengths])
    right.minorticks_off()
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="x-small", loc="upper left" if axes is right else "upper right")
    save_figure(figure, path)


def _is_row(key: str, name: str) -> bool:
    return key.removeprefix(f"{MODEL}, {name}, ").isdigit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--searched", nargs="*", type=Path, default=[], help="results of other tables whose searches count")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--budget", type=int, default=2400, help="sequences a run evaluates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="draw accuracy beside the memory of frontier_memory.py here")
    args = parser.parse_args()
    made: dict[tuple[str, str], tuple[float | str, list[dict[str, Any]]]] = {}
    with ProcessPoolExecutor(args.processes) as pool:
        for task, row, rate, found in pool.map(partial(row_of, args), [(task, row) for row in args.rows for task in args.tasks]):
            made[task, row] = rate, found
    for what, digits in (("training loss", 3), ("accuracy in percent", 1)):
        print(f"\n| {what} | {' | '.join(args.tasks)} |\n|---|" + "---|" * len(args.tasks))
        for row in args.rows:
            numbers = [[last(r) if digits == 3 else 100 * r["accuracy"] for r in made[task, row][1]] for task in args.tasks]
            print(f"| {row} | " + " | ".join(mean(each, digits) for each in numbers) + " |")
    print(f"\n| rate | {' | '.join(args.tasks)} |\n|---|" + "---|" * len(args.tasks))
    for row in args.rows:
        rates = [made[task, row][0] for task in args.tasks]
        print(f"| {row} | " + " | ".join("measured" if rate == "auto" else f"{rate:g}" for rate in rates) + " |")
    if args.figure is not None:
        draw(made, args.tasks, args.figure)
    ours, theirs = "`lozo-g` (default)", "AdamW, LoRA"
    if ours in args.rows and theirs in args.rows:
        print(f"\n{ours} minus {theirs}, accuracy in points:")
        for task in args.tasks:
            a, b = ([100 * r["accuracy"] for r in made[task, row][1]] for row in (ours, theirs))
            print(f"{task}: {statistics.fmean(a) - statistics.fmean(b):+.1f}")


if __name__ == "__main__":
    main()
