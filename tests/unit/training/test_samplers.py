"""Order by class: a permutation, the classes' shares in every stretch, the same order for the same seed and epoch."""

from __future__ import annotations

import itertools
from collections import Counter

import datasets
import numpy as np
import pytest
import torch

from trainer_cases import choice_rows, labelled_rows, trainer
from zotune.training.samplers import Stratified, balanced_group_size, classes_of, lengths_of

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


class Endless:
    """A map-style data set as PyTorch documents it: a length, and an item for any index."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        self.read += 1
        assert self.read <= 10 * len(self.rows), "read beyond its length"
        return self.rows[index % len(self.rows)]


def test_a_data_set_that_never_raises_indexerror_has_an_end(tmp_path):
    rows = [{"input_ids": [1] * (1 + i % 3), "label": i % 2} for i in range(12)]
    assert classes_of(Endless(rows)) == [0, 1] * 6
    assert lengths_of(Endless(rows), "length") == [1, 2, 3] * 4
    run = trainer(tmp_path, train_dataset=Endless(choice_rows(20)), eval_dataset=Endless(choice_rows(20)), max_steps=2)
    run.train()
    assert run.evaluate()["eval_loss"] > 0


def test_token_labels_are_not_read_in_search_of_classes():
    tokens = Endless(labelled_rows())
    assert classes_of(tokens) is None and tokens.read <= 2

    class Columns(datasets.Dataset):
        def __getitem__(self, key):
            assert not isinstance(key, str), "the whole column is read"
            return super().__getitem__(key)

    table = datasets.Dataset.from_list(labelled_rows())
    table.__class__ = Columns
    assert classes_of(table) is None


def test_numbers_of_torch_and_numpy_are_classes():
    for number in (torch.tensor, np.int64, lambda value: torch.tensor([value])):
        assert classes_of([{"labels": number(i % 3)} for i in range(12)]) == [0, 1, 2] * 4


# --- drop_last ---


@pytest.mark.parametrize("objective", ["choices", "labels"])
def test_drop_last_leaves_no_row_out_of_an_evaluation(objective, tmp_path):
    rows = choice_rows(10) if objective == "choices" else labelled_rows(10)
    data = {} if objective == "choices" else {"data_collator": None, "train_dataset": rows}
    losses = []
    for drop in (False, True):
        run = trainer(tmp_path / str(drop), dataloader_drop_last=drop, per_device_eval_batch_size=4, **data)
        losses.append(run.evaluate(rows)["eval_loss"])
        if objective == "choices":
            assert run.predict(rows).predictions.shape[0] == 10
    assert losses[0] == losses[1]


def test_drop_last_of_all_training_rows_is_refused(tmp_path):
    run = trainer(tmp_path, train_dataset=choice_rows(10), dataloader_drop_last=True, per_device_train_batch_size=16)
    with pytest.raises(ValueError, match=r"leaves out all 10 training examples.*batch of 16.*leave dataloader_drop_last out"):
        run.train()
    assert not (tmp_path / "journal.zo").exists()


def test_drop_last_says_how_many_rows_are_left_out(tmp_path, caplog):
    run = trainer(tmp_path, train_dataset=choice_rows(10), dataloader_drop_last=True, per_device_train_batch_size=8, max_steps=3)
    run.train()
    assert run.zo_optimizer.sequences_evaluated == 3 * 2 * 8
    assert any("leaves out 2 of 10 training examples in every epoch" in record.getMessage() for record in caplog.records)


def test_training_data_without_a_row_are_an_error(tmp_path):
    class Empty(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match="there is no training example"):
        trainer(tmp_path / "list", train_dataset=[]).train()
    with pytest.raises(ValueError, match="does not contain any data"):
        trainer(tmp_path / "stream", train_dataset=Empty()).train()
