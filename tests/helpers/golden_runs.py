"""Golden trajectories: ten steps of every method on a toy, kept in tests/data/golden/METHOD.csv.

They change only when the numbers of a method change on purpose: ``python tests/helpers/golden_runs.py [METHOD ...]`` writes them anew.
"""

from __future__ import annotations

import csv
import sys
from typing import NamedTuple

import torch

import paths
import toys
import zotune

FOLDER = paths.TESTS / "data/golden"
STEPS = 10


class Row(NamedTuple):
    """A step: mean loss, first coefficient, and the inner product of all weights after it with cos 0, cos 1, cos 2, ..."""

    step: int
    loss: float
    coefficient: float
    weights: float


def trajectory(name: str, seed: int = 7) -> list[Row]:
    """Ten steps of a method, at an ε large enough for other processors' rounding not to matter."""
    model = toys.classifier()
    method = toys.method(name, eps=1e-2)
    optimizer = zotune.ZerothOrder(model, method, lr=1e-4 if name == "fzoo" else 1e-2, seed=seed)
    rows = []
    for step in range(STEPS):
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
        weights = torch.cat([tensor.flatten() for tensor in model.state_dict().values()]).double()
        product = float(weights @ torch.arange(len(weights)).double().cos())
        rows.append(Row(step, optimizer.last_report.loss, float(optimizer.last_report.coefficients[0]), product))
    return rows


def read(name: str) -> list[Row]:
    """The trajectory on file."""
    with open(FOLDER / f"{name}.csv", newline="") as file:
        return [Row(int(row[0]), *map(float, row[1:])) for row in list(csv.reader(file))[1:]]


def write(name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([row.step, *(f"{number:.7g}" for number in row[1:])] for row in trajectory(name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or toys.names():
        write(each)
