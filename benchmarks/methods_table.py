"""What every method learns from the same number of sequences on the same terms: schedule, order, search for the rate, seeds.

    python benchmarks/methods_table.py --model M --data_dir D --task sst2 --results benchmarks/results/methods_sst2.jsonl

Every rate, backprop's too, is found by one rule: runs of a quarter of the budget with the first seed, a decade apart, up from 1e-5 until
the loss at the end is worse than at an earlier rate for the second time, then three times the best and a third of it. The best by the loss
of all training examples runs with every seed over the whole budget; where one of those ends worse than the quarter of a run did, the next
lower rate takes its place. ``--rates_of`` a file of results of another task takes the rates found there instead, and the next lower one
where a run ends worse than it began. A sequence is one forward pass of one text, a backward pass counts as
two. Accuracy is that of examples held out of the training data. Memory is that of a step as ``zotune estimate`` predicts it, seconds are of
the run over its steps on a machine that did other things too. ``--measured`` adds rows whose rate is measured, measuring counted.

Runs on file are not repeated, so a table can be made of what there is at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from backprop import BACKWARD, ROWS
from learning import HELD_OUT, run

from zotune import methods
from zotune.io.figures import new_figure, save_figure
from zotune.optim.calibration.gains import measurable

#: The first rate of the search, and one that is never passed.
FIRST, MOST = 1e-5, 10.0
#: Part of the budget of a run of the search.
PART = 4
#: What a method needs on a small model. MeZO-SVRG's step at an anchor is a thousand times its others in the paper, where those are 1e-6.
OPTIONS = {"mezo-svrg": {"anchor_ratio": 1.0}}
#: Options as the trainer sets them for answers of so many classes.
BY_CLASS = ("lozo-e", "lozo-g")


def cell(args: argparse.Namespace, method: str, scheme: str, lr: float | str, seed: int, whole: bool) -> dict[str, Any]:
    options = (
        {"num_directions": 3, "directions_per": "group", "group_size": args.classes} if method in BY_CLASS else OPTIONS.get(method, {})
    )
    found = {
        "model": str(args.model),
        "task": args.task,
        "data_dir": str(args.data_dir),
        "template": None,
        "objective": "lm",
        "steps": 0,
        "budget": args.budget if whole else args.budget // PART,
        "eval_steps": 10**9,
        "num_train": args.num_train,
        "num_dev": args.num_dev,
        "schedule": "warmup_stable_decay",
        "threads": 1,
        "stratified": True,
        "scheme": scheme,
        "method": method,
        "options": options,
        "batch_size": 16,
        "seed": seed,
        "end_only": True,
        "score": HELD_OUT,
        "lr": lr,
        "eps": "auto" if lr == "auto" else 1e-3,
    }
    if whole and (args.points or args.rates_of):
        found |= {"end_only": False, "eval_every": args.budget // (args.points or 1)}
    return found | ({"max_tokens": args.max_tokens} if args.max_tokens else {}) | ({"drawn": True} if args.drawn else {})


class Runs:
    """Runs of a file of results, and of others that are only read; those that they lack are run."""

    def __init__(self, path: Path, *others: Path) -> None:
        self.path = path
        lines = [line for each in (*others, path) if each.exists() for line in each.read_text().splitlines()]
        self._found = {self._key(result["cell"]): result for result in map(json.loads, lines)}

    @staticmethod
    def _key(cell: dict[str, Any]) -> str:
        return json.dumps(cell, sort_keys=True)

    def of(self, cell: dict[str, Any]) -> dict[str, Any]:
        key = self._key(cell)
        if key not in self._found:
            result = self._found[key] = run(cell)
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")
        return self._found[key]


def last(result: dict[str, Any]) -> float:
    """The loss of all training examples at the end, infinite for a run that broke off."""
    loss = result["whole"][-1][1]
    return loss if math.isfinite(loss) else math.inf


def search(runs: Runs, args: argparse.Namespace, name: str, scheme: str) -> dict[float, float]:
    """Rates that were tried and the loss at the end of each."""
    tried: dict[float, float] = {}

    def attempt(rate: float) -> None:
        rate = float(f"{rate:.0e}")
        if rate not in tried:
            tried[rate] = last(runs.of(cell(args, name, scheme, rate, 0, whole=False)))

    rate, worse = FIRST, 0
    while worse < 2 and rate <= MOST:
        best = min(tried.values(), default=math.inf)
        attempt(rate)
        worse += tried[max(tried)] >= best
        rate *= 10
    middle = min(tried, key=lambda r: tried[r])
    attempt(middle / 3)
    attempt(middle * 3)
    return dict(sorted(tried.items()))


def found_elsewhere(args: argparse.Namespace, name: str, scheme: str) -> dict[float, float]:
    """Rates that were tried for another task and the loss at the end of each."""
    found = [r for r in map(json.loads, args.rates_of.read_text().splitlines()) if r["cell"]["lr"] != "auto"]
    found = [r for r in found if (r["cell"]["method"], r["cell"]["scheme"]) == (name, scheme)]
    quarter = min((r["cell"]["budget"] for r in found), default=0)
    tried = {r["cell"]["lr"]: last(r) for r in found if r["cell"]["budget"] == quarter}
    if not tried:
        raise SystemExit(f"{args.rates_of} has no search for the rate of {name} ({scheme}): run the table of that task first")
    return dict(sorted(tried.items()))


def whole(runs: Runs, args: argparse.Namespace, name: str, scheme: str, rate: float | str) -> list[dict[str, Any]]:
    """Runs of the whole budget, one a seed."""
    return [runs.of(cell(args, name, scheme, rate, seed, whole=True)) for seed in range(args.seeds)]


def mean(numbers: list[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 and all(map(math.isfinite, numbers)) else ""
    return f"{statistics.fmean(numbers):.{digits}f}{spread}"


def worse(result: dict[str, Any], args: argparse.Namespace, quarter: float) -> bool:
    """Whether a run of the whole budget ended where it should not have."""
    return last(result) > (result["whole"][0][1] if args.rates_of else quarter)


@dataclass(frozen=True, order=True)
class Row:
    """A contender's row of the table, the row of its search, and its whole runs; sorted by the loss."""

    loss: float
    text: str
    searched: str = ""
    label: str = ""
    runs: list[dict[str, Any]] = field(default_factory=list, compare=False)


def row(args: argparse.Namespace, contender: tuple[str, str, bool]) -> Row:
    name, scheme, measured = contender
    problem = refused(args, name, scheme)
    if problem:
        return Row(math.inf, f"| `{name}` | {scheme} | refused: {problem} | | | | |")
    runs = Runs(args.results)
    tried = {} if measured else (found_elsewhere if args.rates_of else partial(search, runs))(args, name, scheme)
    rate: float | str = "auto" if measured else min(tried, key=lambda r: tried[r])
    found = whole(runs, args, name, scheme, rate)
    while not measured and rate > min(tried) and any(worse(r, args, tried[rate]) for r in found):
        rate = max(r for r in tried if r < rate)
        found = whole(runs, args, name, scheme, rate)
    losses = [last(r) for r in found]
    seconds = statistics.median(r["step_seconds"] for r in found)
    text = (
        f"| `{name}` | {scheme} | {'measured' if measured else rate} | {mean(losses)} | {mean([r['accuracy'] for r in found])} | "
        f"{memory(args, name, scheme)} | {seconds:.2f} |"
    )
    grid = ", ".join(f"{rate:g}: {loss:.3g}" for rate, loss in tried.items())
    label = name + (f", {scheme}" if scheme != "full" else "") + (", measured rate" if measured else "")
    return Row(statistics.fmean(losses), text, f"| `{name}` | {scheme} | {grid} |" if tried and not args.rates_of else "", label, found)


def refused(args: argparse.Namespace, name: str, scheme: str) -> str | None:
    """Why a method makes no sense on what a scheme trains."""
    import torch
    from transformers import AutoModelForCausalLM

    import zotune
    from zotune.training import schemes

    if name in BACKWARD:
        return None
    with torch.random.fork_rng():
        model = schemes.apply(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), scheme)
    problem = schemes.refusal(methods.get(name), model, schemes.Scheme(scheme))
    try:
        return problem or zotune.ZerothOrder(model, name).remove_hooks()
    except ValueError as error:
        return str(error)


def memory(args: argparse.Namespace, name: str, scheme: str) -> str:
    from transformers import AutoConfig

    from zotune import baselines
    from zotune.memory import Workload, estimate
    from zotune.training.schemes import Scheme

    if name in BACKWARD and name != "fo-adamw":
        return ""
    config = AutoConfig.from_pretrained(args.model)
    method = baselines.get(name) if name in ROWS else methods.get(name)
    plan = Workload(config, method, batch_size=16, sequence_length=64, scheme=Scheme(scheme), forward_batching="sequential")
    return f"{estimate(plan).total / 1e6:.0f} MB"


def contenders(args: argparse.Namespace) -> list[tuple[str, str, bool]]:
    names = args.methods or [*methods.names(), *ROWS]
    found = [(name, scheme, False) for scheme in args.schemes for name in names if scheme == "full" or name not in list(ROWS)[1:]]
    return found + [(name, "full", True) for name in args.measured if measurable(methods.get(name))]


def plot(rows: list[Row], args: argparse.Namespace) -> None:
    """Loss of all training examples and accuracy of the held-out ones against sequences; means over seeds, bands their range."""
    figure, ((left, right),) = new_figure(1, 2, (10, 3.8))
    for made in rows:
        for axes, what in ((left, "whole"), (right, "curve")):
            points = min(len(r["whole"]) for r in made.runs)  # steps differ in length, so runs may look once more or less
            x = [statistics.fmean(r["whole"][i][0] for r in made.runs) for i in range(points)]
            values = [[r[what][i][1] for r in made.runs] for i in range(points)]
            (line,) = axes.plot(x, [statistics.fmean(v) for v in values], label=made.label)
            axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
    left.set(xlabel="sequences (a backward pass counts as two forwards)", ylabel="loss of all training examples", yscale="log")
    right.set(xlabel="sequences", ylabel=f"accuracy of {args.num_dev} held-out examples", title="mean and range over seeds")
    left.set(title=f"{args.task}, {args.model.name}")
    right.legend(frameon=False, fontsize="small")
    save_figure(figure, args.figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", help="of the table (default: all, and backprop)")
    parser.add_argument("--measured", nargs="*", default=[], help="methods that have a row with a measured rate too")
    parser.add_argument("--schemes", nargs="+", default=["full"])
    parser.add_argument("--budget", type=int, default=2400, help="sequences a run evaluates")
    parser.add_argument("--points", type=int, default=0, help="how often a run looks at loss and accuracy, for a curve")
    parser.add_argument("--num_train", type=int, default=400)
    parser.add_argument("--num_dev", type=int, default=100, help="training examples held out")
    parser.add_argument("--max_tokens", type=int, help="leave out examples with longer prompts")
    parser.add_argument("--drawn", action="store_true", help="draw the training examples of --max_tokens instead of taking the first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates_of", type=Path, help="results of another task whose rates are taken")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="the curves of the whole runs; needs --points")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    found = []
    with ProcessPoolExecutor(args.processes) as pool:
        for made in pool.map(partial(row, args), contenders(args)):
            found.append(made)
            print(made.text, flush=True)
    print("\n| method | scheme | rate | training loss | accuracy | memory of a step | s per step |\n|---|---|---|---|---|---|---|")
    print(*(made.text for made in sorted(found)), sep="\n")
    print("\n| method | scheme | rate: loss |\n|---|---|---|")
    print(*(made.searched for made in found if made.searched), sep="\n")
    if args.figure:
        plot(found, args)


if __name__ == "__main__":
    main()
