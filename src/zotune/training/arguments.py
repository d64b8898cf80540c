"""Options of the commands that are not `transformers.TrainingArguments`: the model and the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zotune.io.sizes import parse_size
from zotune.tasks.chat import variables_of
from zotune.tasks.columns import parsed_columns
from zotune.training.checkpoint.files import GGUF_SOURCE

#: The reward of a task's options by their scores.
ACCURACY = "accuracy"
#: Options of data that are no arguments of :func:`zotune.tasks.prepare`.
OF_REWARDS = ("reward", "guard_task", "guard_file", "attribute")
#: Options of GGUF files.
GGUF_OPTIONS = ("n_threads", "n_gpu_layers", "n_ctx", "n_ubatch", "cache_type", "tokenizer_name")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is an option of a command, with its help text; ``aliases``: other names of it."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = option(None, "model folder, Hugging Face hub id, or a GGUF file, which llama.cpp computes")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of the weights; auto: float32 on a CPU, as stored on a GPU"
    )
    attn_implementation: str | None = option(None, "attention implementation of transformers (eager, sdpa, ...)")
    trust_remote_code: bool = option(False, "run Python code that comes with the model; only for authors you trust")

    offload: Literal["no", "cpu", "disk"] = option(
        "no", "where the blocks are while they are not needed: cpu (host memory of a GPU) or disk (the model's own files)"
    )
    max_memory: str | None = option(None, "with --offload: memory (18GiB) that decides how many blocks stay and how many are prefetched")
    offload_blocks: list[str] | None = option(
        None, "with --offload: name of the model's list of blocks (model.layers), where it is not found"
    )
    offload_dir: str | None = option(None, "with --offload disk: folder for a scratch file of the trained weights")
    quantize: Literal["int8", "int4"] | None = option(
        None, "quantize the Linear layers, which stay frozen; for low-rank methods, qes, --scheme lora, scales"
    )

    n_threads: int = option(0, "of a GGUF file: threads of llama.cpp; 0: as many as torch has")
    n_gpu_layers: int = option(0, "of a GGUF file: blocks on a GPU, where llama.cpp was compiled for one; -1 for all")
    n_ctx: int = option(0, "of a GGUF file: tokens of the longest text; 0: as many as the model was trained with")
    n_ubatch: int = option(1024, "of a GGUF file: tokens that are evaluated at a time, at most")
    cache_type: Literal["f32", "f16"] = option("f32", "of a GGUF file: precision of keys and values; f16 adds noise to loss differences")
    tokenizer_name: str | None = option(None, "of a GGUF file: folder or hub id of its tokenizer, where it is not read from the file")

    def __post_init__(self) -> None:
        if not self.is_gguf and self.model_name_or_path:
            _check_no_gguf(Path(self.model_name_or_path).expanduser())
            fields = {each.name: each.default for each in dataclasses.fields(ModelArguments)}
            given = next((name for name in GGUF_OPTIONS if getattr(self, name) != fields[name]), None)
            if given is not None:
                raise ValueError(f"--{given} is an option of GGUF files, and --model_name_or_path {self.model_name_or_path} is none.")
        for name in ("max_memory", "offload_blocks", "offload_dir"):
            if getattr(self, name) is not None and self.offload == "no":
                raise ValueError(f"--{name} is an option of --offload cpu and --offload disk.")
        if self.max_memory is not None:
            parse_size(self.max_memory)
        if self.offload_dir is not None and not Path(self.offload_dir).expanduser().is_dir():
            raise FileNotFoundError(f"--offload_dir: there is no folder {self.offload_dir!r}.")

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a file, which has to be GGUF, or the folder of a run that trained one."""
        return names_gguf(self.model_name_or_path)

    def require(self, command: str) -> str:
        """The model's name; ValueError when the user gave none."""
        if not self.model_name_or_path:
            raise ValueError(f"{command} needs --model_name_or_path: a model folder, a Hugging Face hub id or a GGUF file.")
        return self.model_name_or_path


def names_gguf(name: str | None) -> bool:
    """Whether a model's name is a file, which has to be GGUF, or the folder of a run that trained one."""
    path = Path(name or "").expanduser()
    return bool(name) and (path.is_file() or (path / GGUF_SOURCE).is_file())


def _check_no_gguf(path: Path) -> None:
    """FileNotFoundError for a GGUF file that is not there, ValueError for a folder that holds nothing else."""
    if path.suffix == ".gguf" and not path.exists():
        raise FileNotFoundError(f"--model_name_or_path: there is no file {str(path)!r}.")
    if path.is_dir() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        files = sorted(each.name for each in path.glob("*.gguf"))
        if files:
            raise ValueError(f"--model_name_or_path {path} is a folder with GGUF files: give one of them, such as {path / files[0]}.")


@dataclass
class EvalDataArguments:
    """Which data to evaluate on, and how a row becomes a prompt with its answer."""

    task: str | None = option(None, "a task of `zotune tasks`, or your own task's YAML file")
    data_dir: str | None = option(None, "folder with <task>/<split>.jsonl[.gz]; without it, the Hugging Face hub")
    eval_file: str | None = option(
        None,
        "your file to evaluate on, JSON Lines, JSON, CSV, TSV, Parquet or text: prompt/completion, instruction/output, text/label, text or "
        "messages; or a task's columns",
        aliases=["--validation_file"],
    )
    dataset_name: str | None = option(
        None, "a data set: its id on the Hugging Face hub, a folder in the hub's layout, or one that save_to_disk wrote"
    )
    dataset_config: str | None = option(None, "configuration of the data set on the hub", aliases=["--dataset_config_name"])
    dataset_test_split: str | None = option(None, "split of --dataset_name to evaluate on; none when not given")
    streaming: bool = option(
        False,
        "read of --dataset_name only what --num_train, --num_dev and --num_eval ask for, as it comes",
        aliases=["--dataset_streaming"],
    )
    columns: list[str] | None = option(None, "names of your columns, such as text=body label=category; label= leaves the column label out")
    template: str | None = option(None, "name of a task's template, or your own: '{sentence} It was'")
    options: list[str] | None = option(None, "answer options in label order, in place of the template's")
    num_eval: int | None = option(None, "evaluation examples, drawn by seed; all when not given")
    num_demonstrations: int | None = option(None, "solved training examples, drawn by seed, before every prompt (in train: --method icl)")
    demonstrations_per: Literal["run", "example"] = option(
        "run", "the same demonstrations for all evaluation examples, or others for each (example, as MeZO)"
    )
    bos_token: str | None = option(None, "the token that starts a prompt, in place of the tokenizer's own")
    max_length: int | None = option(None, "longest example in tokens; the model's context when not given")
    truncate: bool = option(False, "shorten what is too long instead of stopping")
    packing: bool = option(False, "join texts, with the end-of-text token between, and cut them into blocks of --max_length tokens")
    tools: str | None = option(None, "with messages: JSON file with the tools, for the chat template; a row's own come first")
    chat_template_kwargs: dict | str | None = option(
        None, "with messages: variables of the chat template as JSON, such as '{\"enable_thinking\": false}'"
    )
    reward: list[str] | None = option(
        None,
        "reward functions of generated completions: built-in names (exact_match, token_f1, regex:[0-9]+, ...), module:function or "
        "file.py:function; or accuracy, of a task's options by their scores, without generation",
    )

    def __post_init__(self) -> None:
        if self.chat_template_kwargs is not None:
            try:
                self.chat_template_kwargs = variables_of(self.chat_template_kwargs)
            except ValueError as error:
                raise ValueError(f"--{error}") from None
        try:
            parsed_columns(self.columns)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        if self.data_dir is not None and not Path(self.data_dir).expanduser().is_dir():
            raise FileNotFoundError(f"--data_dir: there is no folder {self.data_dir!r}.")
        for name in ("train_file", "eval_file", "guard_file", "attribute", "tools"):
            path = getattr(self, name, None)
            if path is not None and not Path(path).expanduser().is_file():
                raise FileNotFoundError(f"--{name}: there is no file {path!r}.")
        if self.reward is not None:
            self._check_reward(self.reward)

    @property
    def generates(self) -> bool:
        """Whether completions are generated and rewarded."""
        return bool(self.reward) and self.reward != [ACCURACY]

    def of_prepare(self) -> dict[str, Any]:
        """The arguments of :func:`zotune.tasks.prepare`."""
        values = dataclasses.asdict(self)
        for name in OF_REWARDS:
            values.pop(name, None)
        if self.task is None and getattr(self, "guard_task", None) is not None:
            values["data_dir"] = None  # it is the guard's
        if self.reward:
            values["objective"] = "reward" if self.generates else ACCURACY
        return values

    def _check_reward(self, reward: list[str]) -> None:
        if ACCURACY in reward and len(reward) > 1:
            raise ValueError(
                "--reward accuracy scores a task's options without generating, so it cannot stand beside other rewards: use "
                "exact_match there."
            )
        objective = getattr(self, "objective", None)
        if objective is not None:
            raise ValueError(f"--objective {objective} is a loss, and --reward stands in its place: give one of them.")


@dataclass
class DataArguments(EvalDataArguments):
    """Which data to train and evaluate on."""

    train_file: str | None = option(None, "your file to train on, in the same formats")
    dataset_train_split: str | None = option(None, "split of --dataset_name to train on; train when not given")
    objective: Literal["lm", "choices", "accuracy", "classifier", "mlm"] | None = option(
        None,
        "training loss: over the answer's tokens (lm, the default), over the options' scores (choices), their errors, which no gradient "
        "reaches (accuracy), of a classification head (classifier, the default for encoders), or over label words at a mask, by a masked "
        "language model's head (mlm)",
    )
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = option(
        None, "of a head for rows with text and label: numbers, one class, or several labels; as the labels say when not given"
    )
    loss_over: Literal["examples", "tokens"] = option(
        "examples", "with the objective lm: mean of the examples' own means, or over all scored tokens of a batch (tokens)"
    )
    num_train: int | None = option(None, "training examples, drawn by seed; all when not given")
    num_dev: int | None = option(None, "training examples held out for the evaluations during training")
    k_shot: int | None = option(None, "training examples per class")
    guard_task: str | None = option(None, "another task, evaluated beside the run's data: does the model forget it?")
    guard_file: str | None = option(None, "JSON Lines to evaluate beside the run's data, of --guard_task or texts")
    attribute: str | None = option(
        None, "validation examples, JSON Lines in the form of the training data: record how much each training example changes their loss"
    )


@dataclass
class OutputArguments:
    """What happens to an output folder that is in use."""

    overwrite_output_dir: bool = option(False, "replace the run that --output_dir holds")
