"""The options of `zotune prompt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zotune.training.arguments import option


@dataclass
class PromptArguments:
    """Which task, what is searched, on which rows."""

    task: str | None = option(None, "a task of `zotune tasks` with label words, or your own task's YAML file")
    output_dir: str | None = option(None, "folder for best.yaml, search.jsonl and summary.json; the same command goes on with its search")
    data_dir: str | None = option(None, "folder with <task>/<split>.jsonl[.gz]; without it, the Hugging Face hub")
    train_file: str | None = option(None, "JSON Lines with the task's columns to search on, in place of the task's training rows")
    eval_file: str | None = option(None, "JSON Lines with the task's columns for the evaluation at the end")
    templates: str | None = option(None, "YAML file with templates and words to search; without it, built-in variations of the task's own")
    rounds: int = option(4, "rounds: each keeps the better half of the templates and scores them on twice as many rows")
    keep: int = option(4, "templates that the held-out rows choose among, beside the task's own")
    num_search: int = option(256, "training rows to search on, drawn by seed")
    num_dev: int = option(256, "training rows held out to choose the best")
    num_eval: int | None = option(None, "evaluation rows for the comparison at the end, drawn by seed; all when not given, 0 for none")
    max_length: int | None = option(None, "longest example in tokens; the model's context when not given")
    truncate: bool = option(False, "shorten rows that are too long instead of stopping")
    per_device_eval_batch_size: int = option(16, "examples per batch")
    seed: int = option(42, "of the rows")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")

    def __post_init__(self) -> None:
        if not self.task:
            raise ValueError("zotune prompt needs --task: a task of `zotune tasks`, or the YAML file of your own.")
        if not self.output_dir:
            raise ValueError("zotune prompt needs --output_dir: the folder for the task file that it writes.")
        for name in ("rounds", "keep", "num_search", "num_dev", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be 1 or more.")
        if self.num_eval is not None and self.num_eval < 0:
            raise ValueError(f"--num_eval {self.num_eval} must be 0 or more; 0 for no evaluation at the end.")
        if self.rounds > 20:
            raise ValueError(f"--rounds {self.rounds}: each halves the templates, so 20 are enough for a million of them.")
        if self.data_dir is not None and not Path(self.data_dir).expanduser().is_dir():
            raise FileNotFoundError(f"--data_dir: there is no folder {self.data_dir!r}.")
        for name in ("train_file", "eval_file", "templates"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().is_file():
                raise FileNotFoundError(f"--{name}: there is no file {path!r}.")
