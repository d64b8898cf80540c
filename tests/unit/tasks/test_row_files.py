"""Files of rows other than JSON Lines, data sets by name, names of columns, and a task from labels."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from chat_tokenizers import chat_tokenizer
from zotune import tasks
from zotune.tasks import labels, loader
from zotune.tasks.columns import parsed_columns, renamed
from zotune.tasks.encoding import Encoder
from zotune.tasks.files import read_rows
from zotune.tasks.pairs import ALPACA, ALPACA_INPUT
from zotune.tasks.reading import DataSource, named_rows
from zotune.tasks.rows import Rows, Table

ROWS = [{"text": 'two lines,\n"quoted"', "label": "NA"}, {"text": " é ", "label": "007"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def write_csv(path: str, delimiter: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["", "text", "label"])  # the index that pandas writes
        for number, row in enumerate(ROWS):
            writer.writerow([number, row["text"], row["label"]])


def test_every_kind_of_file_has_the_same_rows(tmp_path: Path) -> None:
    for name, delimiter in (("a.csv", ","), ("b.csv", ";"), ("a.tsv", "\t")):
        write_csv(name, delimiter)
    Path("a.csv.gz").write_bytes(gzip.compress(Path("a.csv").read_bytes()))
    Path("a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    Path("b.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet("a.parquet")
    table.save_to_disk("saved")
    (arrow,) = Path("saved").glob("*.arrow")
    for path in ("a.csv", "b.csv", "a.tsv", "a.csv.gz", "a.json", "b.json", "a.parquet", arrow):
        rows = read_rows(path)
        assert list(rows) == [rows[0], rows[1]] == ROWS and rows.columns == ["text", "label"], path
    assert read_rows("a.csv").where(1) == "a.csv, line 4"  # the first row has two lines
    Path("a.txt").write_text("one\n\ntwo\n")
    assert [*read_rows("a.txt")] == [{"text": "one"}, {"text": "two"}] and read_rows("a.txt").where(1) == "a.txt, line 3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,b\n\none, more,c\n", r"a.csv, line 4 has 3 values, and the header has 2 columns: put .* in quotes"),
        ("a.csv", b'text,label\na,"b\nc,d\n', r"a.csv, line 2 is not valid CSV \(unexpected end of data\)"),
        ("a.csv", b"text,label\na,\xff\n", r"a.csv, line 2 is not UTF-8 text"),
        ("a.csv", b"text,text\na,b\n", r"a.csv has two columns named 'text'"),
        ("a.csv", b"text,label\n", r"a.csv holds no rows"),
        ("a.json", b'[{"text": "a"}, 3]', r"a.json, row 1 is no object with columns: 3"),
        ("a.json", b'[{"text": "a"},\n]', r"a.json, line 2 is not valid JSON"),
        ("a.parquet", b"text,label\na,b\n", r"a.parquet cannot be read as Parquet"),
        ("a.xlsx", b"PK", r"a.xlsx is read as no .xlsx file: save it as CSV"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(name)
    assert "\n" not in str(caught.value)


def test_nulls_that_arrow_fills_in_are_no_keys_of_messages() -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": {"city": "x"}}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"unit": "y"}}]}], "tools": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet("a.parquet")
    assert list(read_rows("a.parquet")) == rows


def test_data_sets_by_name_and_folder() -> None:
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split.select([1])}).save_to_disk("both")
    split.save_to_disk("one")
    Path("layout").mkdir()
    split.to_parquet("layout/train-00000-of-00001.parquet")
    split.select([1]).to_parquet("layout/test-00000-of-00001.parquet")
    for name in ("both", "one", "layout"):
        assert list(named_rows(name, None, "train")) == ROWS
    source = DataSource(dataset_name="both", dataset_test_split="test", columns={"sentence": "text"})
    rows = source.eval(None)
    assert rows is not None and list(rows) == [{"sentence": " é ", "label": "007"}] and rows.where(0) == "both (split test), row 0"
    assert list(named_rows("layout", None, "train[:1]")) == ROWS[:1]
    for name, wanted, message in (
        ("both", "tst", r"has no split 'tst'; did you mean 'test': it has train, test"),
        ("one", "test", r"is one data set without splits"),
        ("layout", "dev", r"cannot load layout \(split dev\) \(ValueError: Unknown split"),
        ("no/such", "train", r"cannot load no/such \(split train\) from the Hugging Face hub .*give the name"),
    ):
        with pytest.raises(ValueError, match=message):
            named_rows(name, None, wanted)
    for options in ({"dataset_test_split": "test"}, {"train_file": "a", "dataset_name": "one"}, {"data_dir": "a", "dataset_name": "one"}):
        with pytest.raises(ValueError, match="leave"):
            DataSource(**options)


def test_columns_get_their_names_and_keep_their_places() -> None:
    lines, table = Rows(ROWS, "a", [7, 9]), Rows(Table(datasets.Dataset.from_list(ROWS)), "a", [7, 9])
    for rows in (lines, table):
        found = renamed(rows, {"prompt": "text", "label": ""})
        assert list(found) == [{"prompt": row["text"]} for row in ROWS] and found.columns == ["prompt"]
        assert found.column("prompt") == [row["text"] for row in ROWS]
        with pytest.raises(ValueError, match=r"prompt=txt names no column of a; did you mean 'text': it has text, label"):
            renamed(rows, {"prompt": "txt"})
    gap = Rows([{"body": "a"}, {"other": "b"}], "a.jsonl", [1, 2])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 has no column 'body'"):
        renamed(gap, {"text": "body"})
    assert parsed_columns(["text=a=b", "label="]) == {"text": "a=b", "label": ""}
    for words, message in ((["text"], "'text' is not NAME=COLUMN"), (["a=b", "a=c"], "given twice")):
        with pytest.raises(ValueError, match=message):
            parsed_columns(words)


def labeled(*values: Any) -> Rows:
    return Rows([{"text": "a", "label": value} for value in values], "a.csv", range(2, 2 + len(values)))


def test_labels_become_the_options_of_a_task() -> None:
    made = labels.task_of(labeled("to {x}", "yes", "007", "yes"), "runs/my tickets.v2.csv", "ticket_kind")
    task = loader.task_of(yaml.safe_load(yaml.safe_dump(made)), "it")
    assert task.name == "my-tickets" and task.labels == ("007", "to {x}", "yes")
    assert task.render({"text": " hi ", "label": "yes"}) == ("hi\nTicket kind:", (" 007", " to {x}", " yes"))
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "maybe"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 1]}, features=names)
    task = loader.task_of(labels.task_of(Rows(Table(table), "a", [0, 1]), "a"), "it")
    assert task.options == (" no", " yes", " maybe") and task.answer(table[0]) == 1
    own = labels.task_of(labeled(3, 1), "a", template="{subject}: {body}\nTopic:")
    assert own["columns"] == ["subject", "body"] and own["labels"] == {1: "1", 3: "3"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a", "b", " "), r"a.csv, line 4: column 'label' is empty"),
        (("a", "b", None), r"a.csv, line 4: column 'label' is empty"),
        (("a", "b", "A "), r"a.csv, line 4: column 'label' holds 'A ', and other rows 'a': write them alike"),
        (("a", 1), r"a.csv, line 3: column 'label' holds 1, and other rows 'a'"),
        ((0.5, 1), r"a.csv, line 2: column 'label' holds 0.5, which is no class"),
        (("a", "a"), r"a.csv: column 'label' holds 'a' in every row"),
        (tuple(map(str, range(1001))), r"a.csv, line 1002: column 'label' has more than 1000 different values"),
    ],
)
def test_labels_that_are_no_classes_are_one_sentence(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels.task_of(labeled(*values), "a")


def test_a_row_of_another_form_is_named() -> None:
    tokenizer = chat_tokenizer("byte-level")
    for rows, message in (
        ([{"prompt": "a", "completion": " b"}, {"prompt": "a", "text": "b"}], r"line 2 has no column 'completion'"),
        ([{"prompt": "a", "completion": " b"}, {"prompt": None, "completion": " b"}], r"line 2: column 'prompt' holds null"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}], r"line 2: column 'output' is empty"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], r"line 1: column 'completion' holds no list of messages"),
    ):
        with pytest.raises(ValueError, match=message):
            Encoder(tokenizer).completions(Rows(rows, "mine.jsonl", [1, 2]))


def test_pairs_are_chats_or_alpacas_prompts() -> None:
    chat, plain = chat_tokenizer("byte-level"), chat_tokenizer("unigram")
    kept, plain.chat_template = plain.chat_template, None
    try:
        row = {"instruction": "was it good", "input": "the film", "output": "it was", "system": ""}
        turns = [{"role": "user", "content": "was it good\nthe film"}, {"role": "assistant", "content": "it was"}]
        assert encoded(chat, row) == encoded(chat, {"messages": turns}) == encoded(chat, {"prompt": turns[:1], "completion": turns[1:]})
        prompt = ALPACA_INPUT.format(instruction="was it good", input="the film")
        assert encoded(plain, row) == encoded(plain, {"prompt": prompt, "completion": "it was"})
        short = {"instruction": "was it good", "output": "it was"}
        assert encoded(plain, short) == encoded(plain, {"prompt": ALPACA.format(**short), "completion": "it was"})
        with pytest.raises(ValueError, match=r"'system' needs a chat template"):
            encoded(plain, {**short, "system": "be brief"})
    finally:
        plain.chat_template = kept
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = {"role": "assistant", "content": "d"}
    only_last = {"messages": [turns[0], {**turns[1], "weight": 0}, turns[2], answer]}
    assert encoded(chat, {"prompt": turns, "completion": [answer]}) == encoded(chat, only_last)


def encoded(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    return Encoder(tokenizer).completions(Rows([row], "a", [1]))[0]


def test_calls_that_a_template_has_not_are_refused() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ValueError, match=r"line 1: the chat template writes no tool calls .* message 2"):
        encoded(chat_tokenizer("tinyllama"), {"messages": [{"role": "user", "content": "a"}, call]})


def test_the_columns_of_a_csv_file_hold_chats_as_json() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with open("a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(chat)]])
    (example,) = tasks.prepare(chat_tokenizer("byte-level"), train_file="a.csv").train or ()
    assert example == encoded(chat_tokenizer("byte-level"), {"messages": chat})


def test_packed_texts_are_scored_token_by_token_once() -> None:
    tokenizer = chat_tokenizer("byte-level")
    texts = ["the film was good", "was it good ?", "less so , the plot is dull"]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    whole = [id for text in texts for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    examples = tasks.prepare(tokenizer, train_file="a.jsonl", packing=True, max_length=5).train or ()
    assert [len(each["prompt_ids"] + each["completion_ids"]) for each in examples[:-1]] == [6] * (len(examples) - 1)
    assert whole == whole[:1] + [id for each in examples for id in each["completion_ids"]]
    assert [each["prompt_ids"] for each in examples[1:]] == [each["completion_ids"][-1:] for each in examples[:-1]]
    Path("b.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    for file, options, message in (("a", {"truncate": True}, "would have no effect"), ("b", {}, "packing joins plain texts")):
        with pytest.raises(ValueError, match=message):
            tasks.prepare(tokenizer, train_file=f"{file}.jsonl", packing=True, **options)


def test_what_a_private_run_must_not_publish_is_refused(tmp_path: Path) -> None:
    from zotune.training.arguments import DataArguments
    from zotune.training.privacy_options import check_data

    for options, message in (
        ({"packing": True}, "protects blocks"),
        ({"dataset_name": "a", "dataset_test_split": "train"}, "is the split that is trained on"),
    ):
        with pytest.raises(ValueError, match=message):
            check_data(DataArguments(**options))


def test_a_stream_is_read_as_far_as_it_is_needed() -> None:
    Path("layout").mkdir()
    whole = [{"text": f"text {number}", "label": ("no", "yes")[number % 2]} for number in range(40)]
    Path("layout/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    tokenizer = chat_tokenizer("byte-level")

    def rows(**options: Any) -> Any:
        data = tasks.prepare(tokenizer, dataset_name="layout", streaming=True, num_train=15, num_dev=2, **options)
        assert data.task is not None and data.task.options == (" no", " yes")
        return data.train_rows, data.dev

    (first, dev), (again, _), (other, _) = rows(), rows(), rows(seed=1)
    assert len(first) == 15 and len(dev) == 2 and list(first) == list(again) != list(other)
    assert all(row == whole[number] for number, row in zip(first.numbers, first, strict=True))
    for options, message in (({"num_train": None}, "give --num_train"), ({"dataset_name": None, "train_file": "a.csv"}, "is of data sets")):
        with pytest.raises(ValueError, match=message):
            tasks.prepare(tokenizer, **{"dataset_name": "layout", "streaming": True, "num_train": 5, **options})
    datasets.Dataset.from_list(whole).save_to_disk("saved")
    with pytest.raises(ValueError, match="its rows stay on the disk anyway"):
        tasks.prepare(tokenizer, dataset_name="saved", streaming=True, num_train=5)


def test_labels_of_a_table_that_are_numbers_are_numbers() -> None:
    for name, values, expected in (("a", "1 0", [1, 0]), ("b", "0.5 2", [0.5, 2]), ("c", "007 1", ["007", "1"]), ("d", "1 x", ["1", "x"])):
        Path(f"{name}.csv").write_text("text,label\n" + "".join(f"a,{value}\n" for value in values.split()))
        rows = DataSource(train_file=f"{name}.csv").train(None)
        assert [row["label"] for row in rows] == expected and [row["label"] for row in rows.select([1])] == expected[1:]
    Path("e.csv").write_text("sentence,label\na,1\nb,negative\n")
    task = tasks.load("sst2")
    assert [task.answer(row) for row in DataSource(train_file="e.csv").train(task)] == [1, 0]
