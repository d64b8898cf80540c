"""The configuration of a run: :class:`RunConfig`, and its parser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.methods import default
from zotune.tasks import loader
from zotune.tasks.prompts import longest_answer
from zotune.tasks.reading import EVAL_SOURCES, has_eval_rows
from zotune.training import refusals
from zotune.training.arguments import ACCURACY, DataArguments, ModelArguments, OutputArguments, names_gguf
from zotune.training.config import ZOConfig
from zotune.training.given_options import DECIDED, check_given, generates
from zotune.training.option_parser import OptionParser
from zotune.training.protocols import Applied, Words, applied, names
from zotune.training.schemes import Scheme

#: Defaults of a run that differ from those of :class:`zotune.ZOConfig`.
DEFAULTS = {
    "method": default().name,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "disable_tqdm": True,
}
#: Defaults of a run by a reward, and by an accuracy: of the methods compared in docs/how-to/rewards.md what learned most per token.
REWARD_DEFAULTS: dict[str, Any] = {
    "method": "lozo-e",
    "estimator": "central",
    "num_directions": 1,
    "directions_per": "example",
    "interval": 1,
}
#: The same in an engine, which decodes the prompts of a step together where they share a direction.
ENGINE_REWARD_DEFAULTS: dict[str, Any] = {"method": "lozo"}
PROTOCOL_HELP = (
    f"set all options to those of a paper's published code for this task, model, scheme and method ({', '.join(names())}); options that "
    "are given override it, and the run's record says both"
)


@dataclass
class RunConfig:
    """One fine-tuning run; ``training.output_dir`` is its folder.

    Args:
        data_name: name of the data in reports; None: the task, or the name of the training file.
        protocol: the record of the protocol; None without one.
        push: whether the finished run goes to the hub, as ``training.hub_model_id``.
        words: the options as words of `zotune train`, for the command that resumes the run.
    """

    model: ModelArguments
    data: DataArguments
    training: ZOConfig
    scheme: Scheme = field(default_factory=Scheme)
    output: OutputArguments = field(default_factory=OutputArguments)
    data_name: str | None = None
    protocol: Applied | None = None
    push: bool = False
    words: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.training.output_dir)

    @property
    def name_of_data(self) -> str:
        """Name of the data in reports."""
        return self.data_name or self.data.task or Path(self.data.train_file or self.data.dataset_name or "").name


def option_parser() -> OptionParser:
    """The parser of a run's options."""
    parser = OptionParser((ModelArguments, DataArguments, Scheme, OutputArguments, ZOConfig), "zotune train", DEFAULTS)
    parser.add_argument("--protocol", metavar="NAME", help=PROTOCOL_HELP)
    resume = parser.options()["resume_from_checkpoint"]
    resume.nargs, resume.const = "?", "true"
    for name, reason in (refusals.REFUSED | DECIDED).items():
        parser.options()[name].help = f"refused: {reason}"
    parser.options()["push_to_hub"].help = "push the finished run to the Hugging Face Hub, as `zotune push` does"
    return parser


def parse(words: Sequence[str], parser: OptionParser | None = None) -> RunConfig:
    """The run of the words after `zotune train`.

    Args:
        words: flags and their values; ``--config FILE`` reads more from a YAML file.
        parser: from :func:`option_parser`, to parse many runs with one.

    Raises:
        ValueError: an unknown option, or an invalid value. FileNotFoundError: a file or folder does not exist.
    """
    parser = parser or option_parser()
    found: Words | None = None
    record: Applied | None = None
    push = False

    def before(values: dict[str, Any], given: set[str]) -> list[str]:
        nonlocal found
        found = applied(values, given)
        return [] if found is None else found.words

    def adjust(values: dict[str, Any], given: set[str]) -> None:
        nonlocal record, push
        if found is not None:
            record = found.record(parser.values(found.words), values)
        _adjust(values, given, given if found is None else given | set(found.options))
        push, values["push_to_hub"] = bool(values["push_to_hub"]), False  # the trainer itself pushes nothing

    (model, data, scheme, output, training), _ = parser.parse(words, adjust, before)
    return RunConfig(model, data, training, scheme, output, protocol=record, push=push, words=list(words))


def _adjust(values: dict[str, Any], given: set[str], settled: set[str]) -> None:
    """Adjustments before the checks of ZOConfig; `settled` are the given options and those of a protocol."""
    if not values["output_dir"]:
        raise ValueError("zotune train needs --output_dir: the folder to put the run in.")
    if values["push_to_hub"] and not values["hub_model_id"]:
        raise ValueError("--push_to_hub needs --hub_model_id: the repository to push the finished run to, such as user/name.")
    evaluated = values["num_dev"] or has_eval_rows(*(values[name] for name in EVAL_SOURCES))
    check_given(values, given, evaluated=bool(evaluated))
    if not evaluated:
        values["eval_strategy"] = "no"
    if values["reward"] or values["objective"] == ACCURACY:
        defaults = ENGINE_REWARD_DEFAULTS if names_gguf(values["model_name_or_path"]) else REWARD_DEFAULTS
        if "method" not in settled:
            values.update({name: value for name, value in defaults.items() if name not in settled})
            if values["quantize"] and "interval" not in settled:
                values["interval"] = None  # a redraw adds columns to the factors beside quantized weights
        if values["task"] and generates(values) and "max_completion_length" not in settled:
            values["max_completion_length"] = longest_answer(loader.load(values["task"]))
    if values["load_best_model_at_end"] and "save_steps" not in settled and "save_strategy" not in settled:
        values["save_steps"] = values["eval_steps"]  # the best evaluation needs a checkpoint
