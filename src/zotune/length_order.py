"""The order of examples by length, so that a batch holds texts of like length and little padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class GroupedByLength(Sampler[int]):
    """A random order in which neighbours are of like length (that of transformers' ``group_by_length``), another one every epoch.

    It depends on seed and epoch alone, so that a resumed epoch is the one that was interrupted.

    Args:
        lengths: of the examples.
        group: examples of a step, which shall be alike.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths, self.group, self.seed, self.epoch = list(lengths), group, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0] >> 1)
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=torch.Generator().manual_seed(seed)))


class LongestFirst(Sampler[int]):
    """Falling length; :meth:`restored` puts what came of it back into the order of the data."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self._back = np.argsort(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def restored(self, results: Any) -> Any:
        """Arrays with a row an example, and tuples, lists and mappings of such, in the data's order."""
        if isinstance(results, (tuple, list)):
            return type(results)(self.restored(part) for part in results)
        if isinstance(results, Mapping):
            return {key: self.restored(part) for key, part in results.items()}
        rows = len(results) if getattr(results, "ndim", 0) else None
        return results[self._back] if rows == len(self.order) else results


def lengths_of(dataset: Any, column: str) -> list[int] | None:
    """Tokens of every example, from the data's ``column`` or its ids; None where they hold neither."""
    if column in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[column])
    lengths = []
    for example in dataset:
        length = _length(example, column)
        if length is None:
            return None
        lengths.append(length)
    return lengths


def _length(example: Any, column: str) -> int | None:
    if not isinstance(example, Mapping):
        return None
    if column in example:
        return int(example[column])
    if "prompt_ids" in example:  # of the longest row it makes
        endings = example["option_ids"] if "option_ids" in example else [example.get("completion_ids", ())]
        return len(example["prompt_ids"]) + max(map(len, endings))
    return len(example["input_ids"]) if "input_ids" in example else None
