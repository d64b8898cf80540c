"""Reward functions of a run, their weights, and the rewards of a batch of completions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zotune.rewards.calls import ARGUMENTS, ChecksRows, Failure, RewardCall, RewardFunction, failure, name_of
from zotune.rewards.failures import FailureLimit
from zotune.rewards.loading import load


@dataclass(frozen=True)
class Scores:
    """Rewards of N completions.

    Args:
        total: Σ_f w_f r_f, (N,) float64; NaN for a failed row.
        by_function: r_f, (N,) float64; NaN where the function failed or returned None.
        failures: of all functions.
    """

    total: np.ndarray
    by_function: dict[str, np.ndarray]
    failures: list[Failure]


class Rewards:
    """The weighted sum of reward functions: total = Σ_f w_f r_f over the functions that judge a row.

    A function that returns None does not judge the row. A row has failed where any function failed or none judged it.

    Args:
        functions: callables, or names for :func:`zotune.rewards.loading.load`.
        weights: w, one a function; 1 each by default.
        max_failed: failed rows that a run goes on with.

    Raises:
        ValueError: there is no function, a name is unknown, or the weights do not fit.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | str] | RewardFunction | str,
        weights: Sequence[float] | None = None,
        max_failed: int = 100,
    ) -> None:
        listed: list[Any] = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not listed:
            raise ValueError("give at least one reward function.")
        taken: Counter[str] = Counter()
        self.calls: list[RewardCall] = []
        for each in listed:
            name = each if isinstance(each, str) else name_of(each)
            taken[name] += 1
            self.calls.append(
                RewardCall(load(each) if isinstance(each, str) else each, name if taken[name] == 1 else f"{name}_{taken[name]}")
            )
        self.weights = _weights(weights, len(self.calls))
        self.limit = FailureLimit(max_failed)

    @property
    def names(self) -> list[str]:
        """Names of the functions, each once."""
        return [call.name for call in self.calls]

    def check(self, columns: Iterable[str]) -> None:
        """ValueError where a function asks for a column that the data do not have."""
        for call in self.calls:
            call.check(columns)

    def check_rows(self, rows: Sequence[Mapping[str, Any]], source: str) -> None:
        """ValueError where a row has a right answer that a function cannot compare with, or no row has one.

        Args:
            rows: the columns of each.
            source: the data set, for messages.
        """
        for call in self.calls:
            if isinstance(call.function, ChecksRows):
                answered = False
                for number, row in enumerate(rows):
                    try:
                        answered |= call.function.check_row(row)
                    except ValueError as error:
                        raise ValueError(f"{source}, row {number}, reward {call.name!r}: {error}.") from None
                if not answered:
                    raise ValueError(f"{source}: no row has a right answer for the reward {call.name!r}: fill its column, or name another.")

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Scores:
        """Rewards of N completions, each function called once for all.

        Args:
            prompts: N texts or lists of messages.
            completions: N texts; beside messages also ``[{"role": "assistant", "content": text}]``, which a text becomes.
            columns: further columns of the data, N values each.
            completion_ids: N lists of token ids.
            numbers: of the N rows in their data set, for messages.

        Raises:
            ValueError: a function returns no list of N values, asks for a missing column, or too many rows failed.
        """
        rows = len(prompts)
        arguments: dict[str, Sequence[Any]] = {"prompts": prompts, "completions": _as_prompted(prompts, completions)}
        if completion_ids is not None:
            arguments["completion_ids"] = completion_ids
        for name, values in (columns or {}).items():
            if name in ARGUMENTS:
                raise ValueError(f"a column named {name!r} takes the name of an argument of reward functions: rename the column.")
            arguments[name] = values
        for name, values in arguments.items():
            if len(values) != rows:
                raise ValueError(f"there are {rows} prompts and {len(values)} values of {name!r}; a row needs one each.")
        if not rows:
            return Scores(np.zeros(0), {name: np.zeros(0) for name in self.names}, [])
        scores = self._total(rows, arguments)
        failures = scores.failures if numbers is None else [replace(each, number=int(numbers[each.row])) for each in scores.failures]
        self.limit.record(rows, failures)
        return replace(scores, failures=failures)

    def _total(self, rows: int, arguments: Mapping[str, Sequence[Any]]) -> Scores:
        by_function: dict[str, np.ndarray] = {}
        failures: list[Failure] = []
        for call in self.calls:
            by_function[call.name], failed = call(rows, arguments)
            failures += failed
        values = np.stack(list(by_function.values()))
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.nansum(values * self.weights[:, None], axis=0)
        broken = {each.row for each in failures}
        unjudged = np.isnan(values).all(axis=0)
        for row in np.flatnonzero(unjudged | ~np.isfinite(total)).tolist():
            if row not in broken:
                who, what = ", ".join(self.names), "returned None" if unjudged[row] else "has no finite weighted sum"
                failures.append(failure(who, row, what, what, arguments["prompts"][row], arguments["completions"][row]))
        total[[each.row for each in failures]] = np.nan
        return Scores(total, by_function, failures)


def _as_prompted(prompts: Sequence[Any], completions: Sequence[Any]) -> list[Any]:
    """Completions in the form of their prompts: messages beside messages."""
    if len(prompts) != len(completions):
        raise ValueError(f"there are {len(prompts)} prompts and {len(completions)} completions; a row needs one each.")
    return [
        [{"role": "assistant", "content": text}] if isinstance(text, str) and not isinstance(prompt, str) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def _weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    found = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if found.shape != (count,):
        raise ValueError(f"reward_weights has {found.size} values for {count} reward functions; give one each.")
    if not all(math.isfinite(each) for each in found):
        raise ValueError(f"reward_weights must be finite, and {found.tolist()} is not.")
    return found
