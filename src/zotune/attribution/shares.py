"""Shares of examples: how much each training example changed a validation loss, to first order, from a run's journal.

    s_i = −Σ_t (η_t / K) Σ_k c_itk v_tk

over the measured steps t (see :mod:`zotune.optim.attribution`). In expectation over the directions it is η ⟨∇ℓ_i, ∇L_v⟩ / B with a minus
sign, summed over the steps that took the example: TracIn (2002.08484), and the first-order in-run data Shapley value (2406.11011). Below 0
the example lowered the loss. With all steps measured, the sum over the examples is exactly the first-order part of the change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zotune import methods
from zotune.methods import Method
from zotune.optim.attribution import EVENT, Attributed, attributed, momentum_of
from zotune.optim.journal import Journal
from zotune.optim.journal_records import Record, StepRecord
from zotune.optim.replay import checked_header

#: Part of the measured change by which the sum of shares may differ without a warning.
TOLERANCE = 0.1


@dataclass(frozen=True)
class StepShare:
    """A measured step.

    Attributes:
        step: its number.
        loss: validation loss before it.
        first: first-order part of the change that it made.
        second: second-order part along its directions, exact with one direction; None where it is not known.
    """

    step: int
    loss: float
    first: float
    second: float | None


@dataclass(frozen=True)
class Shares:
    """The shares of a run's examples.

    Attributes:
        sums: s_i over the measured steps, float64, (examples,).
        errors: standard errors of the sums over the example's directions, float64, (examples,); NaN with fewer than two.
        visits: measured steps that took the example, (examples,).
        steps: the measured steps.
        taken: steps of the run that changed the weights.
        end: validation loss after the last step; None of a run that has not ended.
        loss_error: standard error of the validation losses over the validation examples.
        method: of the run.
        decays: whether the weights decayed, which is no example's share.
    """

    sums: Tensor
    errors: Tensor
    visits: Tensor
    steps: list[StepShare]
    taken: int
    end: float | None
    loss_error: float
    method: Method
    decays: bool

    @property
    def scale(self) -> float:
        """Steps taken per step measured: the factor of sums over measured steps that estimates those over all."""
        return self.taken / len(self.steps)

    @property
    def first(self) -> float:
        """First-order part of the change of the validation loss: the sum of all shares, scaled to all steps."""
        return self.scale * math.fsum(step.first for step in self.steps)

    @property
    def first_error(self) -> float:
        """Its standard error over the steps that were not measured; 0 where all were. NaN with one measured step of several."""
        n = len(self.steps)
        if n >= self.taken:
            return 0.0
        mean = math.fsum(step.first for step in self.steps) / n
        squares = math.fsum((step.first - mean) ** 2 for step in self.steps)
        return self.scale * math.sqrt(n * squares / (n - 1) * (1 - n / self.taken)) if n > 1 else math.nan

    @property
    def second(self) -> float | None:
        """Second-order part, scaled to all steps; None where it is not known."""
        parts = [step.second for step in self.steps if step.second is not None]
        return self.scale * math.fsum(parts) if len(parts) == len(self.steps) else None

    @property
    def measured(self) -> float | None:
        """Change of the validation loss over the run; of a run that has not ended, over its measured steps; None with one of them."""
        last = self.end if self.end is not None else self.steps[-1].loss
        return None if self.end is None and len(self.steps) < 2 else last - self.steps[0].loss

    @property
    def warning(self) -> str | None:
        """One sentence where the sum of the shares and the measured change differ by more than their error."""
        if self.measured is None:
            return None
        difference = self.measured - self.first
        spread = 0.0 if math.isnan(self.first_error) else 2 * self.first_error
        if abs(difference) <= max(spread, TOLERANCE * abs(self.measured)):
            return None
        known = "" if self.second is None else f" (curvature along the steps' directions accounts for {self.second:+.3g})"
        decay = ", and weight decay is in no share" if self.decays else ""
        advice = "lower the learning rate" if self.scale == 1 else "measure more steps (--attribute_every 1), or lower the learning rate"
        return (
            f"the shares sum to {self.first:+.4g} and the validation loss changed by {self.measured:+.4g}, a difference of "
            f"{difference:+.3g} beyond the error of {spread:.2g}{known}{decay}: the steps are too long for first order. Trust the order of "
            f"the examples less, and {advice}."
        )


def shares_of(journal: Journal, examples: int | None = None) -> Shares:
    """The shares of a run's examples.

    Args:
        journal: of the run.
        examples: of the training data; None: as many as the journal names.

    Raises:
        ValueError: the run recorded no contributions, or those of examples that it does not have.
    """
    header = checked_header(journal)
    method = methods.get(header["method"], **header["options"])
    notes = _Notes(method)
    measured: list[tuple[Attributed, StepRecord]] = []
    end: Attributed | None = None
    for found, record in attributed(notes.following(journal.records())):
        if record is None:
            end = found
        elif not all(record.skipped):
            measured.append((found, record))
    if not measured:
        raise ValueError(f"{journal.path} holds no contributions of examples: train with --attribute VALIDATION.jsonl.")
    count = examples or 1 + max(int(found.rows.max()) for found, _ in measured)
    rates = notes.effective_rates()
    total, squares = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    terms, visits = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    steps = []
    for found, record in measured:
        rows, k = found.rows.long(), len(found.slopes)
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= count):
            raise ValueError(f"{journal.path}: step {found.step} names training row {int(rows.max())}, and there are {count}.")
        applied = torch.tensor(notes.applied.get(found.step, record.coefficients[:k]), dtype=torch.float64)
        factors = torch.ones(k, dtype=torch.float64) if notes.plain else _ratios(applied, found.sums)
        weights = -rates[found.step] / k * factors * found.slopes.double()
        shares = weights[found.owners] * found.contributions.double()  # (directions of an example, N)
        total.index_add_(0, rows, shares.sum(dim=0))
        squares.index_add_(0, rows, shares.square().sum(dim=0))
        terms.index_add_(0, rows, torch.full_like(rows, len(shares)))
        visits.index_add_(0, rows, torch.ones_like(rows))
        second = None
        if len(found.bends) == k and not notes.momentum:
            second = 0.5 * (max(record.lrs) / k) ** 2 * float((applied.square() * found.bends.double()).sum())
        steps.append(StepShare(found.step, found.loss, float(shares.sum()), second))
    # terms of an example as draws of one distribution: the variance of their sum is n/(n − 1) times their squared deviations
    deviations = (squares - total.square() / terms.clamp(min=1)).clamp(min=0)
    errors = (deviations * terms / (terms - 1).clamp(min=1)).sqrt().masked_fill(terms < 2, math.nan)
    decays = any(group["weight_decay"] or group.get("anchor_decay") for group in header["groups"])
    last = end.loss if end is not None and end.step == notes.steps else None
    loss_error = measured[0][0].loss_error
    return Shares(total, errors, visits, steps, notes.updates, last, loss_error, method, decays)


class _Notes:
    """What shares need of the records of all steps: rates, ε, and coefficients after their shaping."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.momentum, self.weight, self.first_whole = momentum_of(method)
        self.plain = not (method.shaping or method.kernel or method.conservative)
        self.rates: list[float] = []  # of steps that update, in order
        self.places: dict[int, int] = {}  # step → place among them
        self.applied: dict[int, Sequence[float]] = {}
        self.steps = 0
        self._eps = math.nan if isinstance(method.eps, str) else float(method.eps)
        self._state: dict[str, float] = {}
        self._measured = -1

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return len(self.rates)

    def following(self, records: Iterator[Record] | Sequence[Record]) -> Iterator[Record]:
        """The same records, after taking note of each."""
        for record in records:
            if isinstance(record, StepRecord):
                self._step(record)
            elif record.get("event") == "eps":
                self._eps = float(record["value"])
            elif record.get("event") == EVENT:
                self._measured = int(record["step"])
            yield record

    def _step(self, record: StepRecord) -> None:
        self.steps = record.step + 1
        if all(record.skipped):
            return
        self.places[record.step] = len(self.rates)
        self.rates.append(max(record.lrs))
        if self.method.shaping is not None:
            shaped = self.method.shaping.shape(record.coefficients, record.skipped, self._eps, self._state)
            if record.step == self._measured:
                self.applied[record.step] = shaped

    def effective_rates(self) -> dict[int, float]:
        """By step, the sum of the rates at which its estimate is applied: its own, and under momentum those of the steps after it."""
        if not self.momentum:
            return {step: self.rates[place] for step, place in self.places.items()}
        later, found = 0.0, [0.0] * len(self.rates)
        for place in range(len(self.rates) - 1, -1, -1):
            later = self.rates[place] + self.momentum * later
            found[place] = later * (1.0 if self.first_whole and place == 0 else self.weight)
        return {step: found[place] for step, place in self.places.items()}


def _ratios(applied: Tensor, raw: Tensor) -> Tensor:
    """What the coefficients were multiplied by; 0 where there was nothing to multiply."""
    return torch.where(raw == 0, 0.0, applied / raw.masked_fill(raw == 0, 1.0))


def journal_path(run: str | Path, name: str) -> Path:
    """The journal of a run's folder, or the journal itself.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(run).expanduser()
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no journal {path}: name the --output_dir of a zeroth-order run.")
    return path
