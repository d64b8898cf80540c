"""The table and the figure of the comparison, of a results.jsonl."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from zotune.io.figures import new_figure, save_figure

Line = dict[str, Any]


def named(line: Line) -> str:
    return line["method"] + (", half" if line["part"] == 0.5 else "")


def curves_of(lines: list[Line]) -> tuple[dict[str, Line], dict[tuple[str, str], list[list[Line]]]]:
    """The line before training of each task, and of each (task, method) the evaluations of every seed, in order."""
    base = {line["task"]: line for line in lines if not line["tokens"]}
    found: dict[tuple[str, str], dict[int, list[Line]]] = {}
    for line in lines:
        if line["tokens"]:
            of_seed = found.setdefault((line["task"], named(line)), {}).setdefault(line["seed"], [])
            if of_seed and of_seed[-1]["tokens"] >= line["tokens"]:
                of_seed.clear()  # a run that was made again
            of_seed.append(line)
    return base, {key: list(seeds.values()) for key, seeds in found.items()}


def errors(rewards: list[float], base: float) -> str:
    """The gain in standard errors of the mean over seeds."""
    if len(rewards) < 2:
        return ""
    error, gain = statistics.stdev(rewards) / math.sqrt(len(rewards)), statistics.fmean(rewards) - base
    return f"{gain / error:+.1f}" if error > 1e-4 else "∞" if gain else "0"


def table(base: dict[str, Line], runs: dict[tuple[str, str], list[list[Line]]]) -> str:
    head = ["task", "method", "rate", "seeds", "reward", "gain, standard errors", "tokens", "steps", "CPU seconds", "MiB", "distinct"]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for task, before in base.items():
        rows.append(f"| {task} | before training | | | {before['reward']:.3f} | | 0 | | | | {before['distinct']:.2f} |")
        ends = {method: [seed[-1] for seed in seeds] for (of, method), seeds in runs.items() if of == task}
        for method, last in sorted(ends.items(), key=lambda item: -statistics.fmean(line["reward"] for line in item[1])):
            rewards = [line["reward"] for line in last]
            spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
            mean = {name: statistics.fmean(line[name] for line in last) for name in ("tokens", "steps", "cpu_seconds", "distinct")}
            cells = [
                task, method, str(last[0]["learning_rate"]), str(len(last)), f"{statistics.fmean(rewards):.3f} ± {spread:.3f}",
                errors(rewards, before["reward"]), f"{mean['tokens']:.0f}", f"{mean['steps']:.0f}", f"{mean['cpu_seconds']:.0f}",
                f"{max(line['peak_mib'] for line in last):.0f}", f"{mean['distinct']:.2f}",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def figure(base: dict[str, Line], runs: dict[tuple[str, str], list[list[Line]]], path: Path) -> None:
    made, axes = new_figure(len(base), 2, (9, 2.6 * len(base)))
    colors: dict[str, Any] = {}
    for row, (task, before) in zip(axes, base.items(), strict=True):
        for (of, method), seeds in sorted(runs.items()):
            if of != task:
                continue
            points = list(zip(*seeds, strict=False))
            y = [before["reward"], *(statistics.fmean(line["reward"] for line in at) for at in points)]
            low, high = ([before["reward"], *(pick(line["reward"] for line in at) for at in points)] for pick in (min, max))
            for axis, name in zip(row, ("tokens", "cpu_seconds"), strict=True):
                x = [0, *(statistics.fmean(line[name] for line in at) for at in points)]
                (drawn,) = axis.plot(x, y, marker="o", markersize=3, label=method, color=colors.get(method))
                colors[method] = drawn.get_color()
                axis.fill_between(x, low, high, alpha=0.15, color=drawn.get_color())
        row[0].set(ylabel="held-out reward", title=task, xlabel="generated tokens")
        row[1].set(xlabel="CPU seconds, one thread")
    axes[0][1].legend(fontsize=7)
    save_figure(made, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    base, runs = curves_of([json.loads(line) for line in args.results.read_text().splitlines()])
    print(table(base, runs))
    if args.figure:
        figure(base, runs, args.figure)


if __name__ == "__main__":
    main()
