"""The order of examples by class, so that every stretch of it holds the classes in the proportions of the whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

#: Sets of examples with directions of their own that a step has at least, of two examples; of more examples it has twice as many.
LEAST_SETS = 4


def set_size(classes: int, examples: int) -> int | None:
    """Neighbors in a stratified order that share directions of their own in a step of so many examples; None: each has its own.

    What the examples of a class have in common cancels within a set that has every class once, and it is most of what their gradients
    differ by. More sets mean more directions, so that where many classes would leave few sets, pairs of two classes it is.
    """
    if classes < 2 or examples < 2 * LEAST_SETS:
        return None
    return min(classes, max(2, examples // (2 * LEAST_SETS)))


class Stratified(Sampler[int]):
    """A random order without replacement in which any stretch has as many of each class as the whole would let expect, to within one.

    What examples of a class have in common, its weight in the loss, is most of what their gradients differ by: of the noise of a random
    batch on two-class data more than half is its having too many of one class.

    The order depends on seed and epoch alone, so that a resumed epoch is the one that was interrupted.

    Args:
        classes: of the examples.
        seed: of the order.
    """

    def __init__(self, classes: Sequence[Hashable], seed: int) -> None:
        self.members: dict[Hashable, list[int]] = {}
        for index, name in enumerate(classes):
            self.members.setdefault(name, []).append(index)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return sum(map(len, self.members.values()))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        placed: list[tuple[float, int]] = []
        for members in self.members.values():
            # member number r of a class of n lies at (r + u) / n of the way, u the same for the class
            places = (np.arange(len(members)) + random.random()) / len(members)
            placed += zip(places.tolist(), random.permutation(members).tolist(), strict=True)
        return iter([index for _, index in sorted(placed)])


def classes_of(dataset: Any) -> list[Hashable] | None:
    """The class of every example: the number of its right answer, or its label; None where they are not of a few classes."""
    columns = getattr(dataset, "column_names", None)
    column = next((name for name in ("answer", "label", "labels") if name in _columns(dataset)), None)
    if column is None:
        return None
    found = list(dataset[column]) if columns else [example.get(column) for example in dataset]
    if not all(isinstance(name, (int, str)) for name in found):
        return None
    return found if 1 < len(set(found)) <= len(found) // 2 else None


def _columns(dataset: Any) -> Sequence[str]:
    columns = getattr(dataset, "column_names", None)
    if columns:
        return list(columns)
    first = dataset[0] if len(dataset) else None
    return list(first) if isinstance(first, Mapping) else ()


class GroupedByLength(Sampler[int]):
    """A random order in which neighbors are of like length (that of transformers' ``group_by_length``), another one every epoch.

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
