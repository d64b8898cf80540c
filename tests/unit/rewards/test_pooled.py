"""Statistics of several processes are those of one."""

from __future__ import annotations

import numpy as np
import pytest

from zotune.rewards.functions import Scores
from zotune.rewards.statistics import StepStatistics
from zotune.training.rewarded import pooled


def test_statistics_of_parts_are_those_of_all() -> None:
    rewards, lengths = np.array([1.0, 0.0, np.nan, 2.0, 4.0, 1.0]), np.array([3, 4, 4, 1, 2, 2])

    def taken(rows: slice) -> tuple[int, dict[str, float]]:
        statistics = StepStatistics()
        values = rewards[rows]
        count = len(values)
        statistics.add(list(range(count)), ["text"] * count, lengths[rows], Scores(values, {"f": values, "g": values}, []))
        return count, statistics.take()

    rewards[2] = 5.0
    whole = taken(slice(None))[1]
    assert pooled([taken(slice(2)), taken(slice(2, None))]) == pytest.approx(whole)
    rewards[2] = np.nan
    assert pooled([taken(slice(2)), taken(slice(2, None))])["failed_rewards"] == 1
