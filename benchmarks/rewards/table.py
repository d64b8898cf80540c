"""The table and the figure of the comparison, of a results.jsonl."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from record import BUDGET

from zotune.io.figures import new_figure, save_figure

Line = dict[str, Any]


def curves_of(lines: list[Line]) -> tuple[dict[str, Line], dict[tuple[str, str], list[list[Line]]]]:
    """The line before training of each task, and of each (task, method) the evaluations of every seed, in order."""
    base = {line["task"]: line for line in lines if not line["tokens"]}
    found: dict[tuple[str, str], dict[int, list[Line]]] = {}
    for line in lines:
        if line["tokens"]:
            of_seed = found.setdefault((line["task"], line["method"]), {}).setdefault(line["seed"], [])
            if of_seed and of_seed[-1]["tokens"] >= line["tokens"]:
                of_seed.clear()  # a run that was made again
            of_seed.append(line)
    return base, {key: list(seeds.values()) for key, seeds in found.items()}


def gained(rewards: list[float], base: float) -> str:
    """Mean and deviation over seeds, and the gain in standard errors of the mean."""
    if len(rewards) < 2:
        return f"{rewards[0]:.3f}" if rewards else ""
    spread, gain = statistics.stdev(rewards), statistics.fmean(rewards) - base
    times = f"{gain / spread * math.sqrt(len(rewards)):+.1f}" if spread > 1e-4 else "∞"
    return f"{statistics.fmean(rewards):.3f} ± {spread:.3f} ({times})"


def table(base: dict[str, Line], runs: dict[tuple[str, str], list[list[Line]]]) -> str:
    """Rewards after half the tokens and after all, in the order of the first."""
    head = ["task", "method", "rate", "seeds", "after half", "after all", "CPU seconds, half", "MiB", "distinct"]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for task, before in base.items():
        half = 0.5 * BUDGET[task]
        rows.append(f"| {task} | before training | | | {before['reward']:.3f} | | | | {before['distinct']:.2f} |")
        found: list[tuple[float, list[str]]] = []
        for (of, method), seeds in runs.items():
            if of != task:
                continue
            middle = [min(seed, key=lambda line: abs(line["tokens"] - half)) for seed in seeds]
            ends = [seed[-1] for seed in seeds if seed[-1]["tokens"] > 0.95 * BUDGET[task]]
            cells = [
                task, method, str(middle[0]["learning_rate"]), str(len(seeds)),
                gained([line["reward"] for line in middle], before["reward"]), gained([line["reward"] for line in ends], before["reward"]),
                f"{statistics.fmean(line['cpu_seconds'] for line in middle):.0f}", f"{max(line['peak_mib'] for line in middle):.0f}",
                f"{statistics.fmean(line['distinct'] for line in middle):.2f}",
            ]  # fmt: skip
            found.append((statistics.fmean(line["reward"] for line in middle), cells))
        rows += [f"| {' | '.join(cells)} |" for _, cells in sorted(found, reverse=True)]
    return "\n".join(rows)


def figure(base: dict[str, Line], runs: dict[tuple[str, str], list[list[Line]]], path: Path) -> None:
    made, axes = new_figure(len(base), 2, (9, 2.6 * len(base)))
    shown = sorted({method for (_, method), seeds in runs.items() if len(seeds) >= 3})
    colors = {method: f"C{number}" for number, method in enumerate(shown)}
    for row, (task, before) in zip(axes, base.items(), strict=True):
        for (of, method), seeds in sorted(runs.items()):
            if of != task or len(seeds) < 3:
                continue
            points = list(zip(*seeds, strict=False))
            y = [before["reward"], *(statistics.fmean(line["reward"] for line in at) for at in points)]
            low, high = ([before["reward"], *(pick(line["reward"] for line in at) for at in points)] for pick in (min, max))
            for axis, name in zip(row, ("tokens", "cpu_seconds"), strict=True):
                x = [0, *(statistics.fmean(line[name] for line in at) for at in points)]
                axis.plot(x, y, marker="o", markersize=3, color=colors[method])
                axis.fill_between(x, low, high, alpha=0.15, color=colors[method])
        row[0].set(ylabel="held-out reward", title=task, xlabel="generated tokens")
        row[1].set(xlabel="CPU seconds, one thread")
        row[0].locator_params(axis="x", nbins=5)
    for method, color in colors.items():
        axes[-1][1].plot([], [], color=color, label=method)
    axes[-1][1].legend(fontsize=7)
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
