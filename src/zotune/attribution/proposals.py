"""Orders to try: files of row numbers, and the usual curricula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zotune.io.suggest import did_you_mean

NAMES = ("reversed", "shortest", "longest", "easiest", "hardest", "random")
HELP = (
    "an order to try: a file with the number of a training row in each line (as its source counts them), of one pass, which is "
    "repeated, or of all steps; or reversed, shortest, longest (rows by tokens), easiest, hardest (by the loss before training), random "
    "or random:N"
)


@dataclass(frozen=True)
class Proposal:
    """An order by name: the rows of each step, by their index in the training data."""

    name: str
    steps: list[list[int]]


@dataclass(frozen=True)
class Known:
    """What orders are made of.

    Attributes:
        own: the rows of each step of the run.
        numbers: of the training rows in their source, in the order of the data.
        lengths: of the training examples, tokens.
        losses: of the training examples before training.
    """

    own: list[list[int]]
    numbers: Sequence[int]
    lengths: Sequence[int]
    losses: Sequence[float]

    def cut(self, name: str, sequence: Sequence[int]) -> Proposal:
        """A sequence, repeated as often as needed, in steps of the run's sizes."""
        steps, at = [], 0
        for rows in self.own:
            steps.append([sequence[(at + i) % len(sequence)] for i in range(len(rows))])
            at += len(rows)
        return Proposal(name, steps)


def proposals(given: str, known: Known) -> list[Proposal]:
    """The orders of one ``--order``.

    Raises:
        ValueError: it is no such name or file, or the file is no order of the run's rows.
    """
    name, _, more = given.partition(":")
    if name == "random" and not Path(given).is_file():
        if more and not (more.isdigit() and int(more) > 0):
            raise ValueError(f"--order random:N takes a number of random orders, not {more!r}.")
        return [_shuffled(seed, known) for seed in range(int(more or 1))]
    everyone = range(len(known.numbers))
    if given == "reversed":
        rows = [row for step in known.own for row in step]
        return [known.cut(given, rows[::-1])]
    if given in ("shortest", "longest", "easiest", "hardest"):
        keys = known.lengths if given in ("shortest", "longest") else known.losses
        sign = 1 if given in ("shortest", "easiest") else -1
        return [known.cut(given, sorted(everyone, key=lambda row: sign * keys[row]))]
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"--order {given}: there is no such file, and it is none of {', '.join(NAMES)}{did_you_mean(name, NAMES)}.")
    return [known.cut(path.name, _read(path, known))]


def _shuffled(seed: int, known: Known) -> Proposal:
    """Passes over all rows, each in an order of its own."""
    random, total = np.random.default_rng(seed), sum(map(len, known.own))
    rows: list[int] = []
    while len(rows) < total:
        rows += random.permutation(len(known.numbers)).tolist()
    return known.cut(f"random:{seed}", rows[:total])


def _read(path: Path, known: Known) -> list[int]:
    places = {int(number): index for index, number in enumerate(known.numbers)}
    rows = []
    for line, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        if not text.strip().isdigit() or int(text) not in places:
            raise ValueError(f"{path}, line {line}: {text.strip()[:40]!r} is not the number of a training row of the run.")
        rows.append(places[int(text)])
    one, whole = len(places), sum(map(len, known.own))
    if len(rows) not in (one, whole):
        raise ValueError(f"{path} has {len(rows)} rows: write {one}, each training row once, or {whole}, those of all steps.")
    if len(rows) == one and one != whole and len(set(rows)) < one:
        raise ValueError(f"{path} names a row twice: an order of one pass has each of the {one} training rows once.")
    return rows


def moved(known: Known, row: int, places: int) -> list[tuple[int, Proposal]]:
    """The run's order with the last visit of a row moved: it trades places with the first row of steps spread over the last pass.

    Returns:
        (step, order), the earliest first; the step of the row's own last visit is among them.

    Raises:
        ValueError: the run did not take the row.
    """
    visits = [step for step, rows in enumerate(known.own) if row in rows]
    if not visits:
        raise ValueError(f"training row {known.numbers[row]} was in no step of the run.")
    last = visits[-1]
    first = visits[-2] + 1 if len(visits) > 1 else 0
    wanted = sorted({*np.linspace(first, len(known.own) - 1, places).round().astype(int).tolist(), last})
    found = []
    for step in wanted:
        steps = [list(rows) for rows in known.own]
        if step != last:
            here = steps[last].index(row)
            steps[last][here], steps[step][0] = steps[step][0], row
        found.append((step, Proposal(f"row {known.numbers[row]} in step {step}", steps)))
    return found
