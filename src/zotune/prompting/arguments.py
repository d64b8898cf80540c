"""The options of `zotune prompt`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from zotune.training.arguments import option


@dataclass
class PromptArguments:
    """Which task, what is searched, on which rows."""

    task: str | None = option(None, "a task of `zotune tasks` with label words, or your own task's YAML file")
    output_dir: str | None = option(None, "folder for best.yaml, search.jsonl and summary.json; the same command goes on with its search")
    data_dir: str | None = option(None, "folder with <task>/<split>.jsonl[.gz]; without it, the Hugging Face hub")
    train_file: str | None = option(None, "a file with the task's columns to search on, in place of the task's training rows")
    eval_file: str | None = option(None, "a file with the task's columns for the evaluation at the end")
    templates: str | None = option(None, "YAML file with templates and words to search; without it, built-in variations of the task's own")
    llm: str | None = option(
        None, "a language model (folder, hub id, GGUF file) that reads the scores and worst examples and proposes prompts, by trace-opt"
    )
    max_new_tokens: int = option(1024, "of --llm: longest reply in tokens")
    temperature: float = option(0.7, "of --llm: temperature of its replies; 0 for the most likely ones")
    rounds: int | None = option(
        None, "4 rounds, each of which keeps the better half of the templates and doubles the rows; with --llm 10 replies"
    )
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
        for name in ("rounds", "keep", "num_search", "num_dev", "per_device_eval_batch_size", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be 1 or more.")
        if self.num_eval is not None and self.num_eval < 0:
            raise ValueError(f"--num_eval {self.num_eval} must be 0 or more; 0 for no evaluation at the end.")
        self._check_llm()
        if self.rounds is not None and self.rounds > 20 and self.llm is None:
            raise ValueError(f"--rounds {self.rounds}: each halves the templates, so 20 are enough for a million of them.")
        if self.data_dir is not None and not Path(self.data_dir).expanduser().is_dir():
            raise FileNotFoundError(f"--data_dir: there is no folder {self.data_dir!r}.")
        for name in ("train_file", "eval_file", "templates"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().is_file():
                raise FileNotFoundError(f"--{name}: there is no file {path!r}.")

    def _check_llm(self) -> None:
        """ValueError for options that act with ``--llm`` or without it only."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be 0 or more.")
        if self.llm is None:
            fields = {each.name: each.default for each in dataclasses.fields(PromptArguments)}
            given = next((name for name in ("max_new_tokens", "temperature") if getattr(self, name) != fields[name]), None)
            if given is not None:
                raise ValueError(f"--{given} would have no effect: it is an option of --llm; leave --{given} out.")
        elif self.templates is not None:
            raise ValueError("--templates lists what is searched without a language model, and --llm proposes its own: give one of them.")
