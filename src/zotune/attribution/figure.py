"""The figure of a run's shares: their running sum beside the measured validation loss, and their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from zotune.attribution.groups import Entry
from zotune.attribution.shares import Shares
from zotune.io.figures import new_figure, save_figure


def write_figure(shares: Shares, entries: Sequence[Entry], path: str | Path) -> None:
    """Draws the change of the validation loss over the steps, measured and as the sum of shares (left), and a histogram of the shares."""
    figure, panels = new_figure(1, 2, (9.6, 3.8))
    left, right = panels[0]
    numbers, start = [step.step for step in shares.steps], shares.steps[0].loss
    changes = [step.loss - start for step in shares.steps]
    sums = [0.0, *accumulate(shares.scale * step.first for step in shares.steps)]
    ends = [*numbers, max(shares.taken, numbers[-1] + 1)]
    if shares.end is not None:
        changes.append(shares.end - start)
    left.plot(ends[: len(changes)], changes, color="#b0561f", marker="o", markersize=3, label="measured")
    left.plot(ends, sums, color="#1f4e8c", marker="o", markersize=3, label="sum of shares" + (", scaled" if shares.scale > 1 else ""))
    left.axhline(0, color="black", linewidth=0.7)
    left.set(xlabel="step", ylabel="change of the validation loss", title="sum of shares and measured loss")
    left.legend(frameon=False)
    right.hist(
        [entry.share for entry in entries], bins=min(40, max(5, len(entries) // 4)), color="#9db7d5", edgecolor="#1f4e8c", linewidth=0.5
    )
    right.axvline(0, color="black", linewidth=0.7)
    right.set(xlabel="share (below 0: lowered the loss)", ylabel="examples", title="shares of the examples")
    save_figure(figure, path)
