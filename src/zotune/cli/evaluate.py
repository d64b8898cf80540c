"""`zotune eval`: a model on a task, by the log-likelihood of the answer options, or on text, by loss."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import set_seed

from zotune.cli.console import completions_table, new_console
from zotune.cli.parser import help_page
from zotune.cli.replay import base_model
from zotune.cli.table import facts_table
from zotune.io.json_files import write_json
from zotune.io.sizes import size_text
from zotune.io.text import duration_text, metric_text
from zotune.memory.offload_needs import needs_of
from zotune.optim.journal import Journal
from zotune.optim.optimizer import ZerothOrder
from zotune.optim.points import best_points
from zotune.rewards import Rewards
from zotune.rewards.evaluation import Shown
from zotune.subspaces.coordinate import Offset
from zotune.tasks import load, prepare
from zotune.tasks.prompts import longest_answer
from zotune.training import run_folder
from zotune.training.arguments import ACCURACY, EvalDataArguments, ModelArguments
from zotune.training.checkpoint.files import GGUF_SOURCE
from zotune.training.config import ZOConfig
from zotune.training.evaluation import measured
from zotune.training.loading import check_texts, load_model, load_tokenizer, plan_model
from zotune.training.option_parser import OptionParser, check_not_code
from zotune.training.peak_memory import PeakMemory
from zotune.training.quiet import quiet_libraries
from zotune.training.schemes import Scheme
from zotune.training.trainer import ZOTrainer
from zotune.training.voting import voted

#: Tokens of a completion of prompts without a task, at most.
USUAL_LENGTH = 256
#: Options of a GGUF file that determine its metrics.
OF_CONTEXT = ("n_ctx", "n_ubatch", "cache_type", "tokenizer_name")
#: Options of the data that say how rows with a label become prompts.
OF_LABELS = ("columns", "template", "options", "max_length", "truncate", "bos_token")
USAGE = "zotune eval --model_name_or_path MODEL --task TASK [--data_dir DIR] [options]"
ABOUT = (
    "Evaluates a model: option log-likelihood on a task, the class scores of an encoder, the loss on your own text, or the rewards of "
    "greedy completions. The data options of a `zotune train` run are the defaults for its folder."
)


@dataclasses.dataclass
class EvaluationArguments:
    """Options of the evaluation and its output."""

    per_device_eval_batch_size: int = dataclasses.field(default=16, metadata={"help": "examples per batch"})
    seed: int = dataclasses.field(default=42, metadata={"help": "of the subset that --num_eval draws"})
    use_cpu: bool = dataclasses.field(default=False, metadata={"help": "stay on the CPU where there is a GPU"})
    reward_weights: list[float] | None = dataclasses.field(default=None, metadata={"help": "weight of each reward function; 1 each"})
    max_completion_length: int | None = dataclasses.field(
        default=None, metadata={"help": "of a reward: most tokens of a completion; by default those of the task's answers, else 256"}
    )
    num_completions_to_print: int = dataclasses.field(default=4, metadata={"help": "of a reward: how many completions are shown"})
    objective: Literal["mlm"] | None = dataclasses.field(
        default=None,
        metadata={"help": "mlm: of an encoder, label words at the mask of a prompt, in place of the class scores of a new head"},
    )
    vote: int | None = dataclasses.field(
        default=None, metadata={"help": "of a run of randopt: answer by the majority of so many of its best points"}
    )
    adapter: str | None = dataclasses.field(default=None, metadata={"help": "of a GGUF file: the LoRA adapter (GGUF) that is added to it"})
    output_file: str | None = dataclasses.field(
        default=None, metadata={"help": "write the result there as JSON; - prints JSON in place of the table"}
    )


def main(argv: Sequence[str]) -> int:
    """Runs `zotune eval`."""
    quiet_libraries()
    parser = OptionParser((ModelArguments, EvalDataArguments, EvaluationArguments), "zotune eval")
    if {"-h", "--help", "--help-all"} & set(argv):
        model_options = dict.fromkeys((field.name for field in dataclasses.fields(ModelArguments)), "")
        data_options = dict.fromkeys((field.name for field in dataclasses.fields(EvalDataArguments)), "")
        how = dict.fromkeys((field.name for field in dataclasses.fields(EvaluationArguments)), "")
        print(help_page(parser, USAGE, ABOUT, {"model": model_options, "data": data_options, "evaluation": how | {"config": ""}}))
        return 0
    (model, data, how), _ = parser.parse(argv, _options_of_run)
    result = evaluate(model, data, how)
    if how.output_file == "-":
        print(json.dumps(result, indent=2))
        return 0
    if how.output_file is not None:
        write_json(Path(how.output_file).expanduser(), result)
    shown = [Shown(**each) for each in result["completions"]]
    console = new_console()
    if shown:
        console.print(completions_table("completions", shown))
    rows = [(name, metric_text(name, value)) for name, value in result["metrics"].items()]
    rows += [
        ("examples", str(result["examples"])),
        ("time", duration_text(result["seconds"])),
        ("peak memory", f"{size_text(result['peak_memory_bytes'])} ({result['peak_memory_of']})"),
    ]
    console.print(facts_table(rows, f"{result['model']} on {result['data']}"))
    return 0


def evaluate(model: ModelArguments, data: EvalDataArguments, how: EvaluationArguments) -> dict[str, Any]:
    """The result of `zotune eval`: metrics, examples, seconds and peak memory, with model and data.

    Raises:
        ValueError, FileNotFoundError: a wrong request.
    """
    if data.task is None and data.eval_file is None and data.dataset_test_split is None:
        raise ValueError(
            "nothing to evaluate on: pass --task (list them with `zotune tasks`), --eval_file, or --dataset_name and --dataset_test_split."
        )
    rewarded = _rewarded(data, how)
    plan = plan_model(model, "zotune eval")
    if how.adapter is not None:
        if plan.gguf is None or plan.adapter is not None:
            raise ValueError("--adapter is an adapter of a GGUF file: give that file as --model_name_or_path.")
        plan.adapter = how.adapter
    tokenizer = load_tokenizer(plan, model)
    most = rewarded.get("max_completion_length", 0)
    if how.objective is not None and data.reward:
        raise ValueError(f"--objective {how.objective} is a loss, and --reward stands in its place: give one of them.")
    wanted = ({} if how.objective is None else {"objective": how.objective}) | data.of_prepare()
    prepared = prepare(tokenizer, plan.config, seed=how.seed, parts=("eval",), max_completion_length=most, **wanted)
    assert prepared.eval is not None, "prepare loads what is asked for"
    check_texts(plan, tokenizer, prepared)
    with tempfile.TemporaryDirectory(prefix="zotune-eval-") as scratch:
        config = ZOConfig(
            output_dir=scratch,
            per_device_eval_batch_size=how.per_device_eval_batch_size,
            seed=how.seed,
            use_cpu=how.use_cpu,
            disable_tqdm=True,
            **rewarded,
        )
        set_seed(how.seed)
        searched = None if how.vote is None else _best_points(model, how.vote, how.use_cpu)
        if searched is not None:
            network = searched[0].model
        else:
            needs = needs_of(model, plan, config, prepared, None, Scheme())
            network, fresh = load_model(plan, model, config.device, kind=prepared.kind, needs=needs)
            if fresh and plan.adapter is None:
                raise ValueError(f"{plan.name} has no classification head yet, so there is nothing to evaluate; train it first.")
        trainer = ZOTrainer(
            model=network,
            args=config,
            **prepared.optimized(data.reward),
            processing_class=tokenizer if rewarded else None,
            eval_dataset=prepared.eval,
            eval_data_collator=prepared.collate_eval,
            compute_metrics=prepared.compute_metrics,
        )
        memory = PeakMemory(config.device)
        begin = time.perf_counter()
        metrics = measured(trainer, prepared.eval) if searched is None else voted(trainer, *searched, prepared.eval)
        return {
            "model": model.model_name_or_path,
            "data": data.task or Path(data.eval_file or data.dataset_name or "").name,
            "template": prepared.task.template if prepared.task else None,
            "prompt": prepared.task.prompt if prepared.task else None,
            "reward": data.reward,
            "metrics": metrics,
            "completions": [each._asdict() for each in (trainer.rewards.shown if trainer.rewards is not None else ())],
            "examples": len(prepared.eval),
            "seconds": time.perf_counter() - begin,
            "peak_memory_bytes": memory.peak(),
            "peak_memory_of": memory.kind,
            "versions": run_folder.versions(),
        }


def _best_points(model: ModelArguments, count: int, use_cpu: bool) -> tuple[ZerothOrder, list[Offset]]:
    """The best points of the run whose folder the model is, on its base model."""
    folder = Path(model.model_name_or_path or "").expanduser()
    if not (folder / run_folder.JOURNAL_FILE).is_file() or not (folder / run_folder.RUN_FILE).is_file():
        raise ValueError("--vote takes the points of a run of randopt: give its folder, with the journal, as --model_name_or_path.")
    loaded = run_folder.read_run(folder).get("model_arguments")
    base = loaded.get("model_name_or_path") if isinstance(loaded, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{folder / run_folder.RUN_FILE} is damaged: it does not say what the run's base model was.")
    journal = Journal.open(folder / run_folder.JOURNAL_FILE)
    network, _ = base_model(base, journal, folder, trust_remote_code=model.trust_remote_code, use_cpu=use_cpu)
    return best_points(network, journal, count)


def _rewarded(data: EvalDataArguments, how: EvaluationArguments) -> dict[str, Any]:
    """The options of a config for rewards; none where no completions are generated."""
    if data.generates:
        Rewards(data.reward or (), how.reward_weights)  # an unknown one fails before anything is loaded
        most = how.max_completion_length or (USUAL_LENGTH if data.task is None else longest_answer(load(data.task)))
        shown = {"num_completions_to_print": how.num_completions_to_print}
        return {"reward_weights": how.reward_weights, "max_completion_length": most, **shown}
    for field in dataclasses.fields(EvaluationArguments):
        of_rewards = field.name in ("reward_weights", "max_completion_length", "num_completions_to_print")
        if of_rewards and getattr(how, field.name) != field.default:
            raise ValueError(f"--{field.name} would have no effect: it is an option of --reward; leave --{field.name} out.")
    return {}


def _options_of_run(values: dict[str, Any], given: set[str]) -> None:
    """Options of the data, and of a GGUF file's context, default to those of the run whose folder (or checkpoint) the model is from."""
    if not values["model_name_or_path"]:
        return
    folder = Path(values["model_name_or_path"]).expanduser()
    found = next((place for place in (folder, folder.parent) if (place / run_folder.RUN_FILE).is_file()), None) if folder.is_dir() else None
    if found is None:
        return
    run = run_folder.read_run(found)
    loaded, options, trained = (run.get(name) for name in ("model_arguments", "data_arguments", "training_arguments"))
    trained = trained if isinstance(trained, dict) else {}
    if run.get("masked") is True and "objective" not in given and not values["reward"]:
        values["objective"] = "mlm"
    if (folder / GGUF_SOURCE).is_file() and isinstance(loaded, dict):
        values.update({name: loaded[name] for name in OF_CONTEXT if name in loaded and name not in given})
    labeled = "task" not in given and (found / run_folder.TASK_FILE).is_file()
    if not {"task", "eval_file", "dataset_name"} & given:
        if not isinstance(options, dict):
            raise ValueError(f"{found / run_folder.RUN_FILE} is damaged: it does not say what the run's data were.")
        if "reward" not in given and options.get("reward"):
            check_not_code(found / run_folder.RUN_FILE, options["reward"])
        for field in dataclasses.fields(EvalDataArguments):
            of_guard = field.name == "data_dir" and not options.get("task")
            if field.name not in given and field.name in options and not of_guard:
                values[field.name] = options[field.name]
        if "seed" not in given and isinstance(trained.get("seed"), int):
            values["seed"] = trained["seed"]  # of the same subset
    if labeled and isinstance(options, dict) and options.get("task") is None:
        values["task"] = str(found / run_folder.TASK_FILE)  # whose classes are those of the training rows
        values.update({name: options[name] for name in OF_LABELS if name in options and name not in given})
    if values["reward"] and values["reward"] != [ACCURACY] and isinstance(options, dict) and options.get("reward"):
        same = ("max_completion_length", "reward_weights") if values["reward"] == options["reward"] else ("max_completion_length",)
        values.update({name: trained[name] for name in same if name in trained and name not in given})
