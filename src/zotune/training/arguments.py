"""Options of the commands that are not `transformers.TrainingArguments`: the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zotune.io.sizes import parse_size


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "model folder or Hugging Face hub id"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "of the weights; auto: float32 on a CPU, as stored on a GPU"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention implementation that transformers shall use (eager, sdpa, ...)"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run Python code that comes with the model; only for authors you trust"}
    )

    offload: Literal["no", "cpu", "disk"] = field(
        default="no",
        metadata={
            "help": "where the model's blocks are while they are not needed: cpu (host memory of a GPU) or disk (the model's own files)"
        },
    )
    max_memory: str | None = field(
        default=None, metadata={"help": "with --offload: memory (18GiB) that decides how many blocks stay and how many are on their way"}
    )
    offload_blocks: list[str] | None = field(
        default=None, metadata={"help": "with --offload: name of the model's list of blocks (model.layers), where it is not found"}
    )
    offload_dir: str | None = field(
        default=None, metadata={"help": "with --offload disk: folder for a scratch file of the weights that training changes"}
    )
    quantize: Literal["int8", "int4"] | None = field(
        default=None,
        metadata={"help": "hold the Linear layers in so many bits, never written; for low-rank methods, --scheme lora, scales"},
    )

    def __post_init__(self) -> None:
        for name in ("max_memory", "offload_blocks", "offload_dir"):
            if getattr(self, name) is not None and self.offload == "no":
                raise ValueError(f"--{name} is an option of --offload cpu and --offload disk.")
        if self.max_memory is not None:
            parse_size(self.max_memory)
        if self.offload_dir is not None and not Path(self.offload_dir).expanduser().is_dir():
            raise FileNotFoundError(f"--offload_dir: there is no folder {self.offload_dir!r}.")

    def require(self, command: str) -> str:
        """The model's name; ValueError when the user gave none."""
        if not self.model_name_or_path:
            raise ValueError(f"{command} needs --model_name_or_path: a model folder or a Hugging Face hub id.")
        return self.model_name_or_path


@dataclass
class EvalDataArguments:
    """Which data to evaluate on, and how a row becomes a prompt with its answer."""

    task: str | None = field(default=None, metadata={"help": "a task of `zotune tasks`, or your own task's YAML file"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with <task>/<split>.jsonl[.gz]; without it, the Hugging Face hub"})
    eval_file: str | None = field(
        default=None,
        metadata={"help": "your JSON Lines to evaluate on: prompt/completion, text or messages; or a task's columns"},
    )
    template: str | None = field(default=None, metadata={"help": "name of a task's template, or your own: '{sentence} It was'"})
    options: list[str] | None = field(default=None, metadata={"help": "answer options in label order, in place of the template's"})
    num_eval: int | None = field(default=None, metadata={"help": "evaluate on so many examples, drawn by seed"})
    num_demonstrations: int | None = field(
        default=None, metadata={"help": "so many solved training examples, drawn by seed, before every prompt (in train: --method icl)"}
    )
    max_length: int | None = field(default=None, metadata={"help": "longest example in tokens; the model's context when not given"})
    truncate: bool = field(default=False, metadata={"help": "shorten what is too long instead of stopping"})

    def __post_init__(self) -> None:
        if self.data_dir is not None and not Path(self.data_dir).expanduser().is_dir():
            raise FileNotFoundError(f"--data_dir: there is no folder {self.data_dir!r}.")
        for name in ("train_file", "eval_file"):
            path = getattr(self, name, None)
            if path is not None and not Path(path).expanduser().is_file():
                raise FileNotFoundError(f"--{name}: there is no file {path!r}.")


@dataclass
class DataArguments(EvalDataArguments):
    """Which data to train and evaluate on."""

    train_file: str | None = field(default=None, metadata={"help": "your JSON Lines to train on, in the same formats"})
    objective: Literal["lm", "choices", "classifier"] | None = field(
        default=None,
        metadata={
            "help": "training loss: over the answer's tokens (lm, the default), over the options' scores (choices), or "
            "of a classification head (classifier, the default for encoders)"
        },
    )
    num_train: int | None = field(default=None, metadata={"help": "use so many training examples, drawn by seed"})
    num_dev: int | None = field(default=None, metadata={"help": "hold so many training examples out, for the evaluations during training"})
    k_shot: int | None = field(default=None, metadata={"help": "so many training examples of each class"})


@dataclass
class OutputArguments:
    """What happens to an output folder that is in use."""

    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace the run that --output_dir holds"})
