"""Order by class: a permutation, the classes' shares in every stretch, the same order for the same seed and epoch."""

from __future__ import annotations

import itertools
from collections import Counter

import datasets
import pytest

from zotune.training.samplers import Stratified, balanced_group_size, classes_of

CLASSES = ["a"] * 60 + ["b"] * 30 + ["c"] * 10


def test_every_stretch_holds_each_class_in_proportion():
    order = list(Stratified(CLASSES, seed=3))
    assert sorted(order) == list(range(100))
    for length in (7, 10, 33):
        for start in range(100 - length + 1):
            counts = Counter(CLASSES[i] for i in order[start : start + length])
            for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
                assert abs(counts[name] - share * length) <= 1 + 1e-9


def test_neighbors_of_two_equal_classes_alternate():
    order = [i % 2 for i in Stratified([i % 2 for i in range(50)], seed=0)]
    assert all(a != b for a, b in itertools.pairwise(order))


def test_seed_and_epoch_alone_decide():
    sampler = Stratified(CLASSES, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again == list(Stratified(CLASSES, seed=1)) and first != list(Stratified(CLASSES, seed=2))
    sampler.set_epoch(1)
    assert list(sampler) != first and len(sampler) == 100


@pytest.mark.parametrize("column", ["answer", "label", "labels"])
def test_classes_come_from_answers_and_labels(column):
    rows = [{"input_ids": [1], column: i % 3} for i in range(12)]
    assert classes_of(rows) == classes_of(datasets.Dataset.from_list(rows)) == [0, 1, 2] * 4


def test_data_without_classes_has_none():
    assert classes_of([{"input_ids": [1]}] * 4) is None
    assert classes_of([]) is None
    assert classes_of([{"label": i} for i in range(10)]) is None  # all different
    assert classes_of([{"label": 0.5}] * 10) is None
    assert classes_of([{"label": 1}] * 10) is None  # all alike


@pytest.mark.parametrize(
    ("classes", "examples", "size"),
    [(2, 16, 2), (2, 8, 2), (2, 7, None), (1, 16, None), (0, 16, None), (6, 16, 2), (4, 32, 4), (6, 32, 4), (6, 48, 6), (3, 1000, 3)],
)
def test_groups_have_every_class_up_to_eight_else_are_pairs(classes: int, examples: int, size: int | None) -> None:
    assert balanced_group_size(classes, examples) == size
