"""One reward function, called for a batch: its arguments, its values, and which rows failed."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from zotune.io.text import shortened, shown

#: TRL's contract: ``f(prompts=, completions=, completion_ids=, **columns) -> list[float | None]``, called by keyword with N entries each,
#: of which a function without ``**`` names those it takes; it returns N numbers, None for a row that it does not judge. It may be
#: asynchronous. Source: https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function
RewardFunction = Callable[..., Any]


class RewardRequestError(ValueError):
    """A reward function asks for what the data or the installation lack; no row can succeed."""


@dataclass(frozen=True)
class Failure:
    """One row that has no reward.

    Args:
        function: name of the reward function, or of all where none judged the row.
        row: its place in the batch.
        reason: what happened, as in "raised ValueError: ...".
        kind: the part of the reason that failures share, as in "raised ValueError".
        prompt, completion: their beginnings.
        number: of the row in its data set, where it is known.
    """

    function: str
    row: int
    reason: str
    kind: str
    prompt: str
    completion: str
    number: int | None = None

    def __str__(self) -> str:
        where = f"row {self.row} of the batch" if self.number is None else f"row {self.number} of the data"
        return f"reward function {self.function!r} {self.reason} for {where} (prompt {self.prompt}, completion {self.completion})"


#: Most characters of a prompt, a completion and a reason in a message.
_BEGINNING, _REASON = 60, 200


def failure(function: str, row: int, reason: str, kind: str, prompt: Any, completion: Any) -> Failure:
    """A failure with the beginnings of its prompt and completion."""
    return Failure(function, row, shortened(" ".join(reason.split()), _REASON), kind, _beginning(prompt), _beginning(completion))


def _beginning(text: Any) -> str:
    if isinstance(text, list) and text and isinstance(text[-1], Mapping):
        text = text[-1].get("content", "")
    text = str(text)
    return repr(text if len(text) <= _BEGINNING else f"{text[:_BEGINNING]}…")


@runtime_checkable
class ChecksColumns(Protocol):
    """A reward function that says which columns it needs."""

    def check_columns(self, columns: Iterable[str]) -> object:
        """ValueError where none of these columns is what it compares with."""
        ...


@runtime_checkable
class ChecksRows(Protocol):
    """A reward function that says whether it can compare with a row."""

    def check_row(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has a right answer; ValueError where it is none."""
        ...


class RewardCall:
    """A reward function under a name.

    Raises:
        ValueError: the function is not callable, or has a parameter that cannot be given by keyword.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        if not callable(function):
            raise ValueError(f"a reward function must be callable, and {shown(function)} is not.")
        self.function, self.name = function, name
        self._parameters = _parameters(function)
        for each in self._parameters.values():
            if each.kind is each.POSITIONAL_ONLY and each.default is each.empty:
                raise ValueError(
                    f"reward function {name!r} takes {each.name!r} by position alone; arguments come by keyword: remove the '/'."
                )

    def __call__(self, rows: int, arguments: Mapping[str, Sequence[Any]]) -> tuple[np.ndarray, list[Failure]]:
        """Values (N,), NaN for None and for failures, of arguments that have N entries each.

        Raises:
            ValueError: the result is not a list of N values, or a required argument is missing.
        """
        chosen = self._chosen(arguments)
        try:
            found: list[Any] = self._values(chosen, rows)
        except RewardRequestError:
            raise
        except Exception as error:  # a user's function may raise anything
            found = [error] if rows == 1 else self._one_by_one(chosen, rows, error)
        values, failures = np.full(rows, np.nan), []
        for row, value in enumerate(found):
            fault = None
            if isinstance(value, Exception):
                kind = f"raised {type(value).__name__}"
                fault = (f"{kind}: {value}" if str(value) else kind, kind)
            elif value is not None:
                values[row], fault = _number(value)
            if fault:
                failures.append(failure(self.name, row, *fault, arguments["prompts"][row], arguments["completions"][row]))
        return values, failures

    def check(self, columns: Iterable[str]) -> None:
        """ValueError where the function asks for a column that the data do not have, before anything is generated."""
        self._chosen(dict.fromkeys((*ARGUMENTS, *columns), ()))
        if isinstance(self.function, ChecksColumns):
            self.function.check_columns(columns)

    def _chosen(self, arguments: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        parameters = self._parameters.values()
        for each in parameters:
            if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name not in arguments:
                columns = ", ".join(repr(name) for name in arguments if name not in ARGUMENTS) or "none"
                raise ValueError(
                    f"reward function {self.name!r} asks for {each.name!r}, which is no column of the data (columns: {columns}): "
                    "rename the parameter or the column, or give it a default."
                )
        if not parameters or any(each.kind is each.VAR_KEYWORD for each in parameters):
            return dict(arguments)
        return {name: value for name, value in arguments.items() if name in self._parameters}

    def _values(self, arguments: Mapping[str, Sequence[Any]], rows: int) -> list[Any]:
        # A new list for each call: what a function does to it reaches no other function.
        result: Any = self.function(**{name: list(value) for name, value in arguments.items()})
        if inspect.isawaitable(result):
            result = _awaited(result)
        if not isinstance(result, list | tuple) and len(getattr(result, "shape", ())) != 1:
            raise RewardRequestError(
                f"reward function {self.name!r} returned {_described(result)}; it must return a list of {rows} numbers."
            )
        if len(result) != rows:
            raise RewardRequestError(
                f"reward function {self.name!r} returned {len(result)} values for {rows} completions; it must return one each."
            )
        return list(result)

    def _one_by_one(self, arguments: Mapping[str, Sequence[Any]], rows: int, first: Exception) -> list[Any]:
        """Values of single rows, an exception in place of its row's value."""
        found: list[Any] = []
        for row in range(rows):
            try:
                found += self._values({name: value[row : row + 1] for name, value in arguments.items()}, 1)
            except RewardRequestError:
                raise
            except Exception as error:
                found.append(error)
        if not any(isinstance(value, Exception) for value in found):
            warnings.warn(
                f"reward function {self.name!r} raised {type(first).__name__} for {rows} rows at once, and for none of them alone: "
                f"it is called row by row where that happens ({shortened(' '.join(str(first).split()), _REASON)}).",
                stacklevel=2,
            )
        return found


#: Arguments that are no columns.
ARGUMENTS = ("prompts", "completions", "completion_ids")


def name_of(function: Any) -> str:
    """The name of a function, of the function of a partial, or of the class of a callable."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):  # some functions in C have none
        return {}


def _awaited(result: Any) -> Any:
    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as thread:  # a notebook runs a loop, in which no other can run
        return thread.submit(asyncio.run, wait()).result()


def _number(value: Any) -> tuple[float, tuple[str, str] | None]:
    """(the number, None), or (NaN, (reason, kind))."""
    shape = getattr(value, "shape", None)
    plain = value.item() if shape is not None and math.prod(shape) == 1 else value
    kind = f"returned {_described(value)}"
    if not hasattr(type(plain), "__float__") or hasattr(plain, "shape"):
        return math.nan, (f"returned {shown(value, _BEGINNING)}, which is not a number,", kind)
    try:
        number = float(plain)
    except (TypeError, ValueError, OverflowError):
        return math.nan, (f"{kind}, which is no finite float,", kind)
    if not math.isfinite(number):
        return math.nan, (f"returned {number}, which is not finite,", f"returned {number}")
    return number, None


def _described(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
