"""Predicted steps of up to 10,000 workers: losses on the wire against gradients.

    python benchmarks/scaling.py --output docs/images/scaling.png

A model on paper, not a measurement; its assumptions are in docs/explanation/results/speed.md. Weak scaling: every worker brings its own
examples, so that the ideal step takes as long for any number of workers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from traffic import Network, gradients, received

from zotune.io.figures import new_figure, save_figure

WEIGHTS = 13_000_000_000
EXAMPLES, TOKENS = 16, 256  # of every worker
FLOPS = 2e14  # of a worker's accelerator, as achieved
POINTS = 2
#: Numbers of one direction of rank 1 over a 13B model's matrices: 40 blocks of outputs 4 · 5120 + 20480 + 5120, and as much again.
DIRECTION = 40 * (4 * 5120 + 20480 + 5120)
DRAWN = 5e10  # elements that a worker draws and adds per second

DATACENTER = Network("100 Gb/s, 10 µs", 12.5e9, 1e-5)
ETHERNET = Network("1 Gb/s, 200 µs", 1.25e8, 2e-4)
INTERNET = Network("100 Mb/s, 50 ms", 1.25e7, 5e-2)
FORWARD = 2 * WEIGHTS * EXAMPLES * TOKENS / FLOPS


class Step(NamedTuple):
    """Seconds of a step."""

    compute: float
    wire: float
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.wire + self.update


def zeroth(workers: int, network: Network, directions: Callable[[int], int]) -> Step:
    """A step of two points: the table of losses on the wire, and every worker draws all K directions once more for its update."""
    examples = EXAMPLES * workers
    drawn = directions(examples) * DIRECTION
    return Step(POINTS * FORWARD, network.seconds(received(POINTS, examples, workers), workers), drawn / DRAWN)


def first(workers: int, network: Network) -> Step:
    """A step of backprop, three forwards' worth, with gradients in two bytes; what is hidden behind the backward pass is not counted."""
    wire = network.seconds(gradients(WEIGHTS, workers), workers)
    return Step(3 * FORWARD, max(0.0, wire - 2 * FORWARD), 0.0)


BASELINES: dict[str, tuple[Callable[[int], Step], str, str]] = {
    "losses, one direction, 100 Mb/s": (lambda w: zeroth(w, INTERNET, lambda n: 1), "#1f4e8c", ":"),
    "losses, one direction, 1 Gb/s": (lambda w: zeroth(w, ETHERNET, lambda n: 1), "#1f4e8c", "-"),
    "losses, a direction per example, 1 Gb/s": (lambda w: zeroth(w, ETHERNET, lambda n: n), "#7a9cc6", "--"),
    "losses, 1024 directions at most, 1 Gb/s": (lambda w: zeroth(w, ETHERNET, lambda n: min(n, 1024)), "#2e8b57", "-"),
    "gradients, 100 Gb/s": (lambda w: first(w, DATACENTER), "#b0561f", "-"),
    "gradients, 1 Gb/s": (lambda w: first(w, ETHERNET), "#b0561f", "--"),
}


def draw(path: Path, counts: list[int]) -> None:
    """Left: bytes received per worker and step. Right: the share of a worker's time for its own examples."""
    from matplotlib.ticker import PercentFormatter

    figure, ((left, right),) = new_figure(1, 2, (13, 4.2))
    left.plot(counts[1:], [gradients(WEIGHTS, w) for w in counts[1:]], color="#b0561f", label="gradients, 2 bytes each")
    left.plot(counts[1:], [received(POINTS, EXAMPLES * w, w) for w in counts[1:]], color="#1f4e8c", label="losses, all workers'")
    left.set(xscale="log", yscale="log", xlabel="workers", ylabel="bytes received per worker and step", title="on the wire, 13B weights")
    left.legend(frameon=False, loc="center right")
    for name, (step, color, style) in BASELINES.items():
        own = step(1).compute
        right.plot(counts, [own / step(w).total for w in counts], color=color, linestyle=style, label=name)
    right.set(xscale="log", xlabel="workers", title="time spent on examples, predicted", ylim=(0, 1.05))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a figure, as PNG")
    args = parser.parse_args()
    shown = [1, 2, 8, 64, 1000, 10_000]
    print(f"{POINTS} points, {EXAMPLES} x {TOKENS} tokens per worker, a forward of them {FORWARD:.2f} s")
    print("| workers | losses, bytes received | gradients, bytes received | " + " | ".join(BASELINES) + " |")
    print("|" + "---|" * (3 + len(BASELINES)))
    for workers in shown:
        sizes = f"{received(POINTS, EXAMPLES * workers, workers):.3g} | {gradients(WEIGHTS, workers):.3g}"
        parts = [f"{step(1).compute / step(workers).total:.1%}" for step, _, _ in BASELINES.values()]
        print(f"| {workers} | {sizes} | " + " | ".join(parts) + " |")
    if args.output:
        draw(args.output, sorted({round(math.exp(x / 8)) for x in range(round(8 * math.log(10_000)) + 1)} | {10_000}))


if __name__ == "__main__":
    main()
