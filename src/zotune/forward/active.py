"""The evaluation that is going on: what a loss function that generates text tells the forward about its rows.

Generation calls the model once per token, at one point. So perturbed weights and directions are kept for its length instead of made anew
at each call, and rows that have finished leave a batched evaluation, all blocks keeping equally many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from zotune.forward.batch_context import BatchContext


class Keeping(Protocol):
    """A parameter table that can keep what it makes."""

    def keep(self, kept: bool) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is going on.

    Attributes:
        tables: of the modules whose parameters are overridden.
        context: of a batched evaluation; None: all rows are at one point.
    """

    tables: Sequence[Keeping] = ()
    context: BatchContext | None = None

    @property
    def blocks(self) -> int:
        """Blocks of rows, each at a point of its own."""
        return 1 if self.context is None else self.context.blocks

    @property
    def rows(self) -> int | None:
        """A divisor of the rows of every input; None: any."""
        return None if self.context is None else self.context.total

    def narrow(self, rows: int) -> None:
        """From now on there are ``rows`` rows, equally many of each block."""
        if self.context is not None:
            self.context.narrow(rows)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block, weights and directions are made once; afterwards the rows are those of before."""
        context = self.context
        before = None if context is None else context.total
        for table in self.tables:
            table.keep(True)
        if context is not None:
            context.keeps = True
        try:
            yield
        finally:
            for table in self.tables:
                table.keep(False)
            if context is not None and before is not None:
                context.keeps = False
                context.narrow(before)


_NONE = Evaluation()
_ACTIVE: ContextVar[Evaluation] = ContextVar("evaluation", default=_NONE)


def active() -> Evaluation:
    """The evaluation that is going on; without one, that of the model as it is."""
    return _ACTIVE.get()


@contextmanager
def activated(tables: Sequence[Keeping], context: BatchContext | None = None) -> Iterator[None]:
    """Within the block, :func:`active` is this evaluation."""
    token = _ACTIVE.set(Evaluation(tables, context))
    try:
        yield
    finally:
        _ACTIVE.reset(token)
