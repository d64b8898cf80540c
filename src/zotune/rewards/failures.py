"""A limit to failed rewards: warnings once for each kind, an error when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from zotune.rewards.calls import Failure

logger = logging.getLogger(__name__)


class FailureLimit:
    """Counts failed rows of the data, each once a step or part of one.

    Args:
        most: failed rows that a run goes on with.

    Raises:
        ValueError: ``most`` is negative.
    """

    def __init__(self, most: int = 100) -> None:
        if most < 0:
            raise ValueError(f"max_failed_rewards must be at least 0, and {most} is not.")
        self.most, self.failed = most, 0
        self._scored = False
        self._warned: set[tuple[str, str]] = set()

    def record(self, rows: int, failures: Sequence[Failure]) -> None:
        """Take in one batch.

        Raises:
            ValueError: all rows of the first batch failed, or more than ``most`` rows have.
        """
        first, self._scored = not self._scored, self._scored or rows > 0
        if not failures:
            return
        # A prompt fails at many points of a step at once: it counts once.
        self.failed += len({each.row if each.number is None else each.number for each in failures})
        if first and len({each.row for each in failures}) == rows:
            raise ValueError(f"no row of the first batch has a reward: {failures[-1]}.")
        if self.failed > self.most:
            raise ValueError(
                f"{self.failed} rows have no reward, more than max_failed_rewards = {self.most}; the last: {failures[-1]}. "
                "Correct the function, or raise the limit."
            )
        for each in failures:
            if (each.function, each.kind) not in self._warned:
                self._warned.add((each.function, each.kind))
                logger.warning("%s; the row counts for nothing, and further failures of this kind are only counted.", each)
