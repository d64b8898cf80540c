"""Where the rows of a run come from: files, data sets by name or folder, and the published rows of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.io.suggest import did_you_mean
from zotune.tasks.columns import renamed, with_numbers
from zotune.tasks.files import is_text_table, read_rows
from zotune.tasks.rows import Rows, Table
from zotune.tasks.sources import clean, hub_data, load_rows
from zotune.tasks.streams import Stream, streamed_rows
from zotune.tasks.task import Task

#: The options of :func:`has_eval_rows`, in its order.
EVAL_SOURCES = ("task", "data_dir", "train_file", "eval_file", "dataset_name", "dataset_test_split")
#: Files that `save_to_disk` writes: of one data set, and of several by split.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_FIX = "give the name of a data set on the hub, or a folder with one"


@dataclass(frozen=True)
class DataSource:
    """The options that say where rows are.

    Args:
        data_dir: folder with the rows of tasks.
        train_file, eval_file: see :func:`zotune.tasks.files.read_rows`.
        dataset_name: id on the Hugging Face hub, a folder in the hub's layout, or one of `save_to_disk`.
        dataset_config: configuration of that data set.
        dataset_train_split, dataset_test_split: its splits to train and to evaluate on; None: ``train``, and none.
        columns: what the columns are called here -> in the data.
        stream: how much is read of the data set, as it comes; None: all.

    Raises:
        ValueError: options that contradict each other.
    """

    data_dir: str | Path | None = None
    train_file: str | Path | None = None
    eval_file: str | Path | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str | None = None
    dataset_test_split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    stream: Stream | None = None

    def __post_init__(self) -> None:
        for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
            if self.dataset_name is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is of a data set: pass --dataset_name, or leave {name} out.")
        for one, other in (("train_file", "dataset_train_split"), ("eval_file", "dataset_test_split")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} both name rows: leave one of them out.")
        if self.train_file is not None and self.dataset_name is not None and self.dataset_test_split is None:
            raise ValueError("train_file and dataset_name both name rows to train on: leave one of them out, or give --dataset_test_split.")
        if self.dataset_name is not None and self.data_dir is not None:
            raise ValueError("data_dir holds the rows of tasks, and dataset_name names other rows: leave one of them out.")
        if self.stream is not None and self.dataset_name is None:
            raise ValueError("streaming is of data sets: give the folder of your files as --dataset_name, or leave streaming out.")

    def train(self, task: Task | None) -> Rows:
        """The rows to train on; of a task those with a gold label."""
        if self.train_file is not None:
            return self._own(read_rows(self.train_file), task, text=is_text_table(self.train_file))
        if self.dataset_name is not None:
            count = None if self.stream is None else self.stream.train
            return self._own(self._named(self.dataset_train_split or "train", count), task)
        if task is not None:
            return load_rows(task, "train", self.data_dir)
        raise ValueError("nothing to train on: pass --task (list them with `zotune tasks`), --train_file or --dataset_name.")

    def eval(self, task: Task | None) -> Rows | None:
        """The rows to evaluate on; None where there are none."""
        if self.eval_file is not None:
            return self._own(read_rows(self.eval_file), task, text=is_text_table(self.eval_file))
        if self.dataset_name is not None and self.dataset_test_split is not None:
            return self._own(self._named(self.dataset_test_split, None if self.stream is None else self.stream.eval), task)
        evaluated = has_eval_rows(task, self.data_dir, self.train_file, self.eval_file, self.dataset_name, self.dataset_test_split)
        return load_rows(task, "eval", self.data_dir) if evaluated and task is not None else None

    def _named(self, split: str, count: int | None) -> Rows:
        assert self.dataset_name is not None
        if self.stream is None:
            return named_rows(self.dataset_name, self.dataset_config, split)
        folder = Path(self.dataset_name).expanduser()
        if _is_saved(folder):
            raise ValueError(f"{folder} was written by save_to_disk, and its rows stay on the disk anyway: leave streaming out.")
        return streamed_rows(self.dataset_name, self.dataset_config, split, count, self.stream.seed, _FIX)

    def _own(self, rows: Rows, task: Task | None, *, text: bool = False) -> Rows:
        """``text``: every value is one, also the numbers of labels."""
        rows = renamed(rows, self.columns)
        if task is not None:
            return clean(rows, task)
        return with_numbers(rows, "label") if text else rows


def has_eval_rows(
    task: Any, data_dir: Any, train_file: Any, eval_file: Any, dataset_name: Any = None, dataset_test_split: Any = None
) -> bool:
    """Whether there are rows to evaluate on. Own training rows are evaluated on a published split only where data_dir is given."""
    own = train_file is not None or dataset_name is not None
    return eval_file is not None or dataset_test_split is not None or (task is not None and (not own or data_dir is not None))


def named_rows(name: str, config: str | None, split: str) -> Rows:
    """The rows of a split of a data set on the hub, in a folder of its layout, or of `save_to_disk`; ValueError: there are none."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(folder.iterdir()):
        raise ValueError(f"the folder {folder} is empty: {_FIX}.")
    if not _is_saved(folder):
        local = folder.is_dir()
        data = hub_data(str(folder) if local else name, config, split, _FIX if not local else "see to its files and its README.md")
        return Rows(Table(data), f"{name} (split {split})", range(len(data)), unit="row")
    import datasets  # slow to import, and not needed for files

    if config is not None:
        raise ValueError(f"{folder} was written by save_to_disk and has no configuration {config!r}: leave dataset_config out.")
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged, or of another version
        raise ValueError(f"{folder} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}).") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{folder} has no split {split!r}{did_you_mean(split, data)}: it has {_listed(list(data))}.")
        data = data[split]
    elif split != "train":
        raise ValueError(f"{folder} is one data set without splits, so there is no {split!r}: give its folder as training data alone.")
    if not len(data):
        raise ValueError(f"{folder} (split {split}) holds no rows.")
    return Rows(Table(data), f"{folder} (split {split})", range(len(data)), unit="row")


def _is_saved(folder: Path) -> bool:
    return (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names)) or "none"
