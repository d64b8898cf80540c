"""Statistics of the completions of a step, over all its points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from zotune.rewards.functions import Scores


class StepStatistics:
    """Sums over completions until they are taken; of texts it holds one for each prompt and sample.

    Attributes:
        points: at which a step completes every prompt. Each run of so many completions is compared with its first: that at − with that
            at + where they come in pairs, those at the other points with that at θ where the first one is.
        count: completions since they were last taken.
    """

    def __init__(self, points: int = 2) -> None:
        self.points = points
        self._clear()

    def _clear(self) -> None:
        self.count = self._pairs = self._same = 0
        self._tokens = 0.0
        self._rewards: list[np.ndarray] = []  # of few numbers each
        self._by_function: dict[str, list[np.ndarray]] = {}
        self._seen: dict[tuple[int, int], tuple[int, str]] = {}  # by prompt and sample: completions, and the first of their run

    def add(self, numbers: Sequence[int], texts: Sequence[str], lengths: np.ndarray, scores: Scores) -> None:
        """Add completions, row-major by prompt and sample, in the order of the points."""
        samples = len(texts) // len(numbers)
        self.count += len(texts)
        self._tokens += float(lengths.sum())
        self._rewards.append(scores.total)
        for name, values in scores.by_function.items():
            self._by_function.setdefault(name, []).append(values)
        for place, text in zip(((number, sample) for number in numbers for sample in range(samples)), texts, strict=True):
            seen, first = self._seen.get(place, (0, ""))
            if seen % self.points == 0:
                first = text
            else:
                self._pairs += 1
                self._same += text == first
            self._seen[place] = seen + 1, first

    def take(self) -> dict[str, float]:
        """``reward``, ``reward_std`` (over completions), ``completion_length``, ``identical_completions`` (share of pairs of points whose
        completions of a prompt are the same: they say nothing), ``failed_rewards`` and ``reward_<function>``; {} without completions."""
        if not self.count:
            return {}
        rewards = np.concatenate(self._rewards)
        good = rewards[np.isfinite(rewards)]
        found = {"reward": float(good.mean()) if len(good) else math.nan, "reward_std": float(good.std()) if len(good) else 0.0}
        found["completion_length"] = self._tokens / self.count
        if self._pairs:
            found["identical_completions"] = self._same / self._pairs
        if len(good) < len(rewards):
            found["failed_rewards"] = float(len(rewards) - len(good))
        if len(self._by_function) > 1:
            columns = {name: np.concatenate(parts) for name, parts in self._by_function.items()}
            found |= {f"reward_{name}": float(np.nanmean(values)) for name, values in columns.items() if not np.isnan(values).all()}
        self._clear()
        return found
