"""What a run is asked to do: :class:`RunConfig`, and reading it from the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.methods import default
from zotune.training.arguments import DataArguments, ModelArguments, OutputArguments
from zotune.training.config import ZOConfig
from zotune.training.option_parser import OptionParser
from zotune.training.schemes import Scheme

#: Where a run's defaults are others than those of :class:`zotune.ZOConfig`.
DEFAULTS = {
    "method": default().name,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "disable_tqdm": True,
}


@dataclass
class RunConfig:
    """One fine-tuning run.

    Args:
        model: which model, and how it is loaded.
        data: what it is trained and evaluated on.
        training: settings of training; ``output_dir`` is the run's folder.
        scheme: which parameters are trained.
        output: what happens to a folder that is in use.
        data_name: what reports call the data; None: the name of the task or of the training file.
        words: the options as words of `zotune train`, for the command that resumes the run.
    """

    model: ModelArguments
    data: DataArguments
    training: ZOConfig
    scheme: Scheme = field(default_factory=Scheme)
    output: OutputArguments = field(default_factory=OutputArguments)
    data_name: str | None = None
    words: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.training.output_dir)

    @property
    def name_of_data(self) -> str:
        """What reports call the data."""
        return self.data_name or self.data.task or Path(self.data.train_file or "").name


def option_parser() -> OptionParser:
    """The parser of a run's options."""
    parser = OptionParser((ModelArguments, DataArguments, Scheme, OutputArguments, ZOConfig), "zotune train", DEFAULTS)
    resume = parser.options()["resume_from_checkpoint"]
    resume.nargs, resume.const = "?", "true"
    return parser


def parse(words: Sequence[str], parser: OptionParser | None = None) -> RunConfig:
    """The run that the words after `zotune train` describe.

    Args:
        words: flags and their values; ``--config FILE`` reads more from a YAML file.
        parser: from :func:`option_parser`, where many runs are read.

    Raises:
        ValueError: an unknown option, or a value that makes no sense. FileNotFoundError: a file or folder does not exist.
    """
    (model, data, scheme, output, training), _ = (parser or option_parser()).parse(words, _adjust)
    return RunConfig(model, data, training, scheme, output, words=list(words))


def _adjust(values: dict[str, Any], given: set[str]) -> None:
    """What must be settled before ZOConfig looks at its fields."""
    if not values["output_dir"]:
        raise ValueError("zotune train needs --output_dir: the folder to put the run in.")
    if values["load_best_model_at_end"] and "save_steps" not in given and "save_strategy" not in given:
        values["save_steps"] = values["eval_steps"]  # the best evaluation needs its checkpoint
