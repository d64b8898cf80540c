"""The mode of execution of steps: real, or a dry run on tensors without data.

The few functions that differ in a dry run read :func:`current`; the dry run sets its own :class:`Execution`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Execution:
    """A mode of execution. The defaults are those of real steps.

    Args:
        block_size: elements per block of a loop over a large tensor; None: the device's default.
        first_block_only: of the blocks of a large tensor, and of the strips of a matrix, only the first is computed.
        whole_weights: a large weight is materialized whole, never in strips.
        has_values: tensors have values, which checks of data may read.
        isolates_generators: a loss is evaluated with isolated torch generators.
        clock: a clock in seconds.
        make_subclass: makes a tensor of a class from (class, tensor); None: ``Tensor._make_subclass``.
    """

    block_size: int | None = None
    first_block_only: bool = False
    whole_weights: bool = False
    has_values: bool = True
    isolates_generators: bool = True
    clock: Callable[[], float] = time.perf_counter
    make_subclass: Callable[[type, Any], Any] | None = None


REAL = Execution()
_current = REAL


def current() -> Execution:
    """The current mode."""
    return _current


@contextmanager
def executing(execution: Execution) -> Iterator[None]:
    """For the length of a block, the mode of all threads."""
    global _current
    before, _current = _current, execution
    try:
        yield
    finally:
        _current = before


def walked(blocks: Iterable[Any]) -> Iterable[Any]:
    """The blocks that are computed: all, or the first one."""
    return itertools.islice(blocks, 1) if _current.first_block_only else blocks


def clock() -> float:
    """Seconds; only differences are meaningful."""
    return _current.clock()


def make_subclass(cls: Any, tensor: Any) -> Any:
    """``tensor`` as a tensor of class ``cls`` that shares its memory."""
    make = _current.make_subclass
    return cls._make_subclass(cls, tensor) if make is None else make(cls, tensor)
