"""Statistics of the completions of a step, over all its points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zotune.rewards.functions import Scores


class Completion(NamedTuple):
    """A completion at one point.

    Attributes:
        number: of its prompt in the data.
        sample: of the prompt at that point.
        text: the completion.
        length: its tokens.
        reward: the total; NaN where it failed.
    """

    number: int
    sample: int
    text: str
    length: int
    reward: float


class StepStatistics:
    """Collects completions until they are taken.

    Attributes:
        one_sided: whether the first point of a step is θ itself, which the others are compared with; else points come in pairs ±.
    """

    def __init__(self) -> None:
        self.one_sided = False
        self.completions: list[Completion] = []
        self.by_function: dict[str, list[float]] = {}

    def add(self, numbers: Sequence[int], texts: Sequence[str], lengths: np.ndarray, scores: Scores) -> None:
        """Add completions, row-major by prompt and sample, in the order of the points."""
        samples = len(texts) // len(numbers)
        places = [(number, sample) for number in numbers for sample in range(samples)]
        rows = zip(places, texts, lengths.tolist(), scores.total.tolist(), strict=True)
        self.completions += [Completion(*place, text, length, reward) for place, text, length, reward in rows]
        for name, values in scores.by_function.items():
            self.by_function.setdefault(name, []).extend(values.tolist())

    def take(self) -> dict[str, float]:
        """``reward``, ``reward_std`` (over completions), ``completion_length``, ``identical_completions`` (share of pairs of points whose
        completions of a prompt are the same: they say nothing), ``failed_rewards`` and ``reward_<function>``; {} without completions."""
        completions, self.completions = self.completions, []
        by_function, self.by_function = self.by_function, {}
        if not completions:
            return {}
        rewards = np.array([each.reward for each in completions])
        good = rewards[np.isfinite(rewards)]
        found = {"reward": float(good.mean()) if len(good) else float("nan"), "reward_std": float(good.std()) if len(good) else 0.0}
        found["completion_length"] = float(np.mean([each.length for each in completions]))
        identical = self._identical(completions)
        if identical is not None:
            found["identical_completions"] = identical
        if len(good) < len(rewards):
            found["failed_rewards"] = float(len(rewards) - len(good))
        if len(by_function) > 1:
            found |= {f"reward_{name}": float(np.nanmean(values)) for name, values in by_function.items() if not np.isnan(values).all()}
        return found

    def _identical(self, completions: Sequence[Completion]) -> float | None:
        texts: dict[tuple[int, int], list[str]] = {}
        for each in completions:
            texts.setdefault((each.number, each.sample), []).append(each.text)
        pairs: list[tuple[str, str]] = []
        for found in texts.values():
            if self.one_sided:
                pairs += [(found[0], text) for text in found[1:]]
            else:
                pairs += list(zip(found[0::2], found[1::2], strict=False))
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else None
