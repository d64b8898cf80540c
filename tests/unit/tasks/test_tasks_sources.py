"""Rows: the strict JSON Lines reader, local folders, the hub when offline, and subsets by seed."""

from __future__ import annotations

import collections
import gzip
import json
import random

import numpy as np
import pytest
import torch

from zotune import tasks
from zotune.tasks.sources import Rows, clean, load_rows, read_jsonl, sample, split_train


def test_rows_of_a_file_and_of_its_gzip_are_the_same(tmp_path):
    text = '{"text": "é", "label": 1}\n\n{"text": "b", "label": 0}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    for name in ("a.jsonl", "a.jsonl.gz"):
        rows = read_jsonl(tmp_path / name)
        assert list(rows) == [{"text": "é", "label": 1}, {"text": "b", "label": 0}]
        assert rows.columns == ["text", "label"]
        assert rows.where(1) == f"{tmp_path / name}, line 3"  # the blank line counts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"x.jsonl, line 2 is not valid JSON \(Expecting value at column 6\)"),
        (b'{"a": 1}\n\n["a"]\n', r"x.jsonl, line 3 holds a list, not an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"x.jsonl, line 2 is not UTF-8"),
        (b"", r"x.jsonl holds no rows"),
        (b"\n \n", r"x.jsonl holds no rows"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_jsonl(tmp_path / "x.jsonl")


def test_a_file_that_is_absent_or_no_gzip(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*absent.jsonl"):
        read_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b'{"a": 1}\n')
    with pytest.raises(ValueError, match=r"x.jsonl.gz cannot be unpacked as gzip"):
        read_jsonl(tmp_path / "x.jsonl.gz")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-12])
    with pytest.raises(ValueError, match=r"y.jsonl.gz cannot be unpacked as gzip"):
        read_jsonl(tmp_path / "y.jsonl.gz")


def test_a_missing_column_is_named_with_those_present(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"sentense": "a", "label": 1}\n')
    with pytest.raises(
        ValueError,
        match=r"x.jsonl has no column 'sentence': it has sentense, label; did you mean 'sentense'",
    ):
        clean(read_jsonl(tmp_path / "x.jsonl"), tasks.load("sst2"))
    (tmp_path / "y.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sentence": "a"}\n')
    with pytest.raises(ValueError, match=r"y.jsonl, line 2 has no column 'label': it has sentence"):
        clean(read_jsonl(tmp_path / "y.jsonl"), tasks.load("sst2"))


def test_rows_without_a_label_are_left_out_line_numbers_kept(tmp_path):
    lines = [json.dumps({"premise": "a", "hypothesis": "b", "label": label}) for label in (-1, 2, -1, 0)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = clean(read_jsonl(tmp_path / "x.jsonl"), tasks.load("snli"))
    assert [row["label"] for row in rows] == [2, 0]
    assert rows.where(1).endswith("line 4")


def test_a_local_folder(data_dir):
    assert len(load_rows(tasks.load("sst2"), "eval", data_dir)) == 872
    assert len(load_rows(tasks.load("sst2"), "train", data_dir)) == 5000
    assert len(load_rows(tasks.load("ag_news"), "train", data_dir)) == 4000  # gzip
    assert len(load_rows(tasks.load("mr"), "test", data_dir)) == 1066  # a split by its own name
    assert load_rows(tasks.load("mnli"), "eval", data_dir).source.endswith("validation_matched.jsonl")


def test_a_folder_or_file_that_is_not_there(tmp_path):
    task = tasks.load("sst2")
    with pytest.raises(ValueError, match=r"no data folder .*nowhere"):
        load_rows(task, "train", tmp_path / "nowhere")
    (tmp_path / "sst5").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*sst2; did you mean 'sst5'; .* holds sst5"):
        load_rows(task, "train", tmp_path)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "dev.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"no file train.jsonl or train.jsonl.gz in .*: it holds dev.jsonl"):
        load_rows(task, "train", tmp_path)


def test_an_unreachable_hub_says_to_pass_a_data_dir():
    with pytest.raises(ValueError, match=r"cannot load nyu-mll/glue/sst2 \(split train\).*pass --data_dir") as caught:
        load_rows(tasks.load("sst2"), "train")
    assert "\n" not in str(caught.value)


def numbered(count: int, classes: int = 2) -> Rows:
    rows = [{"text": str(i), "label": i % classes if i % 5 else 0} for i in range(count)]
    return Rows(rows, "numbers", range(count))


def test_a_subset_is_a_pure_function_of_the_seed():
    rows = numbered(100)
    train, dev = split_train(rows, seed=1, num_train=30, num_dev=20)
    again = split_train(rows, seed=1, num_train=30, num_dev=20)
    other, _ = split_train(rows, seed=2, num_train=30, num_dev=20)
    assert (list(train), list(dev)) == (list(again[0]), list(again[1]))
    assert list(train) != list(other)
    assert (len(train), len(dev)) == (30, 20)
    assert not {row["text"] for row in train} & {row["text"] for row in dev}
    assert list(sample(rows, 10, seed=1)) == list(sample(rows, 10, seed=1)) != list(sample(rows, 10, seed=2))


def test_dev_rows_do_not_change_with_the_number_of_training_rows():
    rows = numbered(100)
    _, few = split_train(rows, seed=1, num_train=5, num_dev=20)
    train, many = split_train(rows, seed=1, num_dev=20)
    assert list(few) == list(many)
    assert len(train) == 80


def test_numbers_of_rows_are_upper_limits():
    assert len(split_train(numbered(10), seed=0, num_train=99)[0]) == 10
    assert len(sample(numbered(10), 99, seed=0)) == len(sample(numbered(10), None, seed=0)) == 10


def test_subsets_leave_the_global_generators_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    rows = numbered(50)
    split_train(rows, seed=3, num_train=10, num_dev=10)
    split_train(rows, seed=3, k_shot=2, answers=rows.column("label"))
    sample(rows, 5, seed=3)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_k_shot_takes_k_of_each_class(data_dir):
    for name in ("sst2", "trec", "cb"):
        task = tasks.load(name)
        rows = load_rows(task, "train", data_dir)
        answers = [task.answer(row) for row in rows]
        train, dev = split_train(rows, seed=5, k_shot=8, num_dev=40, answers=answers)
        counts = collections.Counter(task.answer(row) for row in train)
        assert counts == dict.fromkeys(range(len(task.labels)), 8)
        assert not set(train.numbers) & set(dev.numbers)


def test_too_few_rows():
    rows = numbered(10)
    with pytest.raises(ValueError, match=r"num_dev=10 leaves nothing to train on: numbers holds 10 rows"):
        split_train(rows, seed=0, num_dev=10)
    with pytest.raises(ValueError, match=r"k_shot=9, but numbers has \d training rows of class [01]"):
        split_train(rows, seed=0, k_shot=9, answers=rows.column("label"))
    with pytest.raises(ValueError, match=r"num_train and k_shot exclude each other"):
        split_train(rows, seed=0, k_shot=1, num_train=3, answers=rows.column("label"))


def test_rows_over_a_datasets_dataset():
    import datasets

    rows = Rows(datasets.Dataset.from_list(list(numbered(20))), "hub", range(20), unit="row")
    train, dev = split_train(rows, seed=0, num_train=5, num_dev=3)
    assert [row["text"] for row in train] == [str(n) for n in train.numbers]
    assert (len(dev), dev.columns, dev.where(0)) == (3, ["text", "label"], f"hub, row {dev.numbers[0]}")
    assert len(dev.column("label")) == 3


def test_k_of_each_class_holds_out_rows_of_each_class_too() -> None:
    rows = Rows([{"n": n} for n in range(60)], "r", range(60))
    answers = [0] * 40 + [1] * 15 + [2] * 5
    train, dev = split_train(rows, seed=0, k_shot=2, num_dev=7, answers=answers)
    assert dev is not None
    count = collections.Counter(answers[row["n"]] for row in dev)
    assert count == {0: 3, 1: 2, 2: 2}
    assert collections.Counter(answers[row["n"]] for row in train) == {0: 2, 1: 2, 2: 2}
    assert not {row["n"] for row in train} & {row["n"] for row in dev}
    again = split_train(rows, seed=0, k_shot=3, num_dev=7, answers=answers)[1]
    assert again is not None and list(again) == list(dev)
