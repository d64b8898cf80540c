"""The order of examples: by class, so that the classes are balanced throughout; by length; and what a trainer takes of them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import has_length

logger = logging.getLogger(__name__)

#: Fewest groups of examples in a step, each of two examples with directions of its own; with more examples twice as many.
MIN_GROUPS = 4


def train_sampler(dataset: Any, args: Any, step_size: int) -> Sampler[int] | None:
    """The order of ``args.train_sampling_strategy``; None: that of `transformers.Trainer`.

    `transformers`' own grouping by length draws from the global generator, so that a resumed epoch has another order.

    Args:
        dataset: training examples.
        args: a :class:`zotune.ZOConfig`.
        step_size: examples per step.

    Raises:
        ValueError: the lengths of the examples are needed and unknown.
    """
    strategy, seed = args.train_sampling_strategy, args.seed if args.data_seed is None else args.data_seed
    if not has_length(dataset):
        return None
    if strategy == "stratified":
        classes = classes_of(dataset)
        return None if classes is None else Stratified(classes, seed)
    if strategy != "group_by_length":
        return None
    lengths = lengths_of(dataset, args.length_column_name)
    if lengths is None:
        raise ValueError(
            "train_sampling_strategy='group_by_length' needs to know how long an example is: give the data a column "
            f"{args.length_column_name!r}, prompt_ids or input_ids, or leave the strategy at 'random'."
        )
    return GroupedByLength(lengths, step_size, seed)


def eval_sampler(dataset: Any, args: Any) -> Sampler[int] | None:
    """The longest examples first where that changes no result, else the order of the data."""
    whole = args.eval_do_concat_batches and not args.batch_eval_metrics
    # A batch's loss is the mean over its examples of these kinds, whichever are together.
    if (
        whole
        and isinstance(dataset, (list, tuple))
        and all(isinstance(x, Mapping) and ("prompt_ids" in x or "label" in x) for x in dataset)
    ):
        lengths = lengths_of(dataset, args.length_column_name)
        if lengths is not None:
            return LongestFirst(lengths)
    return SequentialSampler(dataset) if has_length(dataset) else None


def check_training_data(dataset: Any, drop_last: bool, batch: int) -> None:
    """ValueError where an epoch has no batch; says in the log what ``drop_last`` leaves out.

    Args:
        dataset: training examples; nothing is known of one without a length.
        drop_last: whether an incomplete batch is left out.
        batch: examples in a batch of all processes.
    """
    if not has_length(dataset):
        return
    rows = len(dataset)
    if rows == 0:
        raise ValueError("there is no training example: the data set is empty.")
    left_out = rows % batch if drop_last else 0
    if left_out == rows:
        raise ValueError(
            f"dataloader_drop_last leaves out all {rows} training examples, which are fewer than a batch of {batch}: "
            "leave dataloader_drop_last out, or choose a smaller per_device_train_batch_size."
        )
    if left_out:
        logger.warning(f"dataloader_drop_last leaves out {left_out} of {rows} training examples in every epoch.")


def balanced_group_size(classes: int, examples: int) -> int | None:
    """Neighbors in a stratified order that share directions in a step of ``examples``; None: each example has its own.

    The common part of a class's gradients, most of the variance between examples, cancels in a group with every class once. More groups
    mean more directions, so with many classes the groups are pairs of two classes.
    """
    if classes < 2 or examples < 2 * MIN_GROUPS:
        return None
    return min(classes, max(2, examples // (2 * MIN_GROUPS)))


class EpochSampler(Sampler[int]):
    """An order that depends on seed and epoch alone, so that a resumed epoch has the order of the interrupted one."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Stratified(EpochSampler):
    """A random order without replacement in which any stretch has as many of each class as expected, to within one.

    The classes have different mean gradients: in a random batch of two-class data their imbalance is more than half of the noise.

    Args:
        classes: of the examples.
        seed: of the order.
    """

    def __init__(self, classes: Sequence[Hashable], seed: int) -> None:
        self.members: dict[Hashable, list[int]] = {}
        for index, name in enumerate(classes):
            self.members.setdefault(name, []).append(index)
        super().__init__(seed)

    def __len__(self) -> int:
        return sum(map(len, self.members.values()))

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        placed: list[tuple[float, int]] = []
        for members in self.members.values():
            # member r of a class of n is at position (r + u) / n, with one u for each class
            places = (np.arange(len(members)) + random.random()) / len(members)
            placed += zip(places.tolist(), random.permutation(members).tolist(), strict=True)
        return iter([index for _, index in sorted(placed)])


def classes_of(dataset: Any) -> list[Hashable] | None:
    """The class of every example: the index of its right answer, or its label; None where there are no or too many classes."""
    columns, first = getattr(dataset, "column_names", None), dataset[0] if len(dataset) else None
    if not isinstance(first, Mapping):
        return None
    name = next((name for name in ("answer", "label", "labels") if name in first), None)
    if name is None or _class(first[name]) is None:  # a label for every token is none of the example
        return None
    values = dataset[name] if columns else (example.get(name) for example in examples_of(dataset))
    found = [_class(value) for value in values]
    if None in found:
        return None
    return found if 1 < len(set(found)) <= len(found) // 2 else None


def _class(label: Any) -> Hashable | None:
    """A whole number or a text; None for anything else."""
    if isinstance(label, (torch.Tensor, np.generic, np.ndarray)):
        whole = not (label.is_floating_point() if isinstance(label, torch.Tensor) else np.issubdtype(label.dtype, np.floating))
        label = label.item() if whole and np.prod(label.shape) == 1 else None
    return label if isinstance(label, (int, str)) else None


def examples_of(dataset: Any) -> Iterator[Any]:
    """The examples of a map-style data set. Its length is its end: `__getitem__` need not raise an IndexError."""
    return (dataset[index] for index in range(len(dataset)))


class GroupedByLength(EpochSampler):
    """A random order with neighbors of similar length (that of transformers' ``group_by_length``), another one every epoch.

    Args:
        lengths: of the examples.
        group: examples per step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths, self.group = list(lengths), group
        super().__init__(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0] >> 1)
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=torch.Generator().manual_seed(seed)))


class LongestFirst(Sampler[int]):
    """Decreasing length; :meth:`restored` puts results back into the order of the data."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self._back = np.argsort(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def restored(self, results: Any) -> Any:
        """Arrays with one row per example, and tuples, lists and mappings of such, in the order of the data."""
        if isinstance(results, (tuple, list)):
            return type(results)(self.restored(part) for part in results)
        if isinstance(results, Mapping):
            return {key: self.restored(part) for key, part in results.items()}
        rows = len(results) if getattr(results, "ndim", 0) else None
        return results[self._back] if rows == len(self.order) else results


def lengths_of(dataset: Any, column: str) -> list[int] | None:
    """Tokens of every example, from the data's ``column`` or its ids; None where there are neither."""
    if column in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[column])
    lengths = [_length(example, column) for example in examples_of(dataset)]
    return None if None in lengths else lengths  # type: ignore[return-value]


def _length(example: Any, column: str) -> int | None:
    if not isinstance(example, Mapping):
        return None
    if column in example:
        return int(example[column])
    if "prompt_ids" in example:  # of the longest row it makes
        endings = example["option_ids"] if "option_ids" in example else [example.get("completion_ids", ())]
        return len(example["prompt_ids"]) + max(map(len, endings))
    return len(example["input_ids"]) if "input_ids" in example else None
