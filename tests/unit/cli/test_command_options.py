"""Every option of every command acts, is refused with the reason, or is irrelevant: a new option needs a row here.

The fields of ZOConfig, which are options of `zotune train` too, are in tests/unit/training/test_config_fields.py.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import zotune
from command_cases import run_command, save_data, save_model
from paths import ROOT
from zotune.cli import estimate
from zotune.cli.evaluate import EvaluationArguments
from zotune.cli.main import COMMANDS
from zotune.cli.parser import CommandParser
from zotune.prompting import PromptArguments
from zotune.tasks import prepare
from zotune.training import run_config, schemes
from zotune.training.arguments import DataArguments, EvalDataArguments, ModelArguments, OutputArguments
from zotune.training.given_options import CONDITIONAL, DECIDED, OF_EVALUATIONS
from zotune.training.loading import load_model, plan_model
from zotune.training.reward_options import REWARD_FIELDS
from zotune.training.schemes import Scheme
from zotune.weights.offload import stream_of

pytest.importorskip("peft")

_CLI, _OFFLOAD = "tests/integration/test_cli.py::", "tests/unit/weights/test_offload.py::"
_HOSTILE = "tests/integration/test_hostile.py::test_a_foreign_model_is_refused_and_runs_nothing"
_CHAT = "tests/unit/tasks/test_chat.py::test_tools_calls_and_variables_reach_the_template"
_PUSH = "tests/unit/publishing/"
_EXPORT = _PUSH + "test_export.py::"
_DISK = _OFFLOAD + "test_the_command_line_trains_from_disk_as_from_memory"
_BENCH = "tests/unit/bench/test_bench.py::test_a_killed_bench_ends_with_the_table_of_an_unbroken_one"
_RUN = _CLI + "test_a_run_leaves_model_summary_curve_and_replayable_journal"
_ESTIMATE = "tests/unit/cli/test_estimate_command.py::"
_DRAWS, _MEASURES = _ESTIMATE + "test_estimate_compares_methods_and_draws", _ESTIMATE + "test_the_process_grows_by_what_was_predicted"
_CONVERT = "tests/unit/engines/test_gguf_convert.py::test_the_command_converts_and_spares_a_file"
_GGUF = "tests/integration/test_gguf_runs.py::"
_REWARD = "tests/unit/cli/test_reward_command.py::"
_LOGGED, _ACCURACY = _REWARD + "test_a_run_by_rewards_is_logged_and_evaluated", _REWARD + "test_an_accuracy_is_a_reward_without_generation"
_WEIGHED = _REWARD + "test_options_of_rewards_are_refused_by_eval_without_one"
_INFLUENCE = "tests/unit/cli/test_influence_command.py::test_a_run_lists_its_rows_by_share"
_ORDERS = "tests/unit/cli/test_orders_command.py::"
_TOLD = _ORDERS + "test_orders_of_a_run_are_told_and_the_best_is_saved"
_PROMPT, _ADVICE = "tests/unit/prompting/test_prompt_search.py::", "tests/unit/prompting/test_prompt_advice.py::"
_MERGE = "tests/unit/optim/test_merge.py::test_the_command"
#: On a machine with a GPU it acts.
GPU = "acts on a machine with a GPU only"

# --- options that a test below turns: option -> (options beside it, a value, another value) ---

DATA: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "data_dir": ({}, "data", "other"),
    "train_file": ({}, None, "rows.jsonl"),
    "eval_file": ({}, None, "rows.jsonl"),
    "dataset_name": ({}, None, "hub-layout"),
    "dataset_config": ({"dataset_name": "hub-layout"}, None, "other"),
    "dataset_train_split": ({"dataset_name": "hub-layout"}, None, "validation"),
    "dataset_test_split": ({"dataset_name": "hub-layout"}, "train", "validation"),
    "streaming": ({"dataset_name": "hub-layout"}, False, True),
    "columns": ({"train_file": "renamed.jsonl"}, ["sentence=body"], ["sentence=other"]),
    "template": ({}, None, "{sentence} It was"),
    "options": ({}, None, [" bad", " good"]),
    "objective": ({}, "lm", "choices"),
    "num_train": ({}, None, 4),
    "num_dev": ({}, None, 4),
    "num_eval": ({}, None, 4),
    "k_shot": ({}, None, 2),
    "num_demonstrations": ({}, 1, 2),
    "demonstrations_per": ({"num_demonstrations": 1}, "run", "example"),
    "bos_token": ({}, None, "great"),
    "max_length": ({"truncate": True}, None, 6),
    "truncate": ({"max_length": 6}, False, True),
    "packing": ({"task": None, "data_dir": None, "train_file": "text.jsonl"}, False, True),
}
SCHEME: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "scheme": ({}, "full", "head"),
    "lora_r": ({"scheme": "lora"}, 2, 4),
    "lora_alpha": ({"scheme": "lora"}, 8.0, 16.0),
    "lora_dropout": ({"scheme": "lora"}, 0.0, 0.1),
    "lora_target_modules": ({"scheme": "lora"}, ["q_proj"], ["v_proj"]),
    "num_virtual_tokens": ({"scheme": "prompt"}, 2, 3),
    "trainable": ({}, ["mlp"], ["lm_head"]),
}
MODEL: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "model_name_or_path": ({}, "my-model", "second"),
    "dtype": ({}, "float32", "bfloat16"),
    "attn_implementation": ({}, "eager", "sdpa"),
    "offload": ({}, "no", "disk"),
    "quantize": ({}, None, "int8"),
}
PREDICTED: dict[str, tuple[list[str], list[str], list[str]]] = {
    "scheme": ([], ["--scheme", "full"], ["--scheme", "lora"]),
    "lora_r": (["--scheme", "lora"], ["--lora_r", "2"], ["--lora_r", "8"]),
    "num_virtual_tokens": (["--scheme", "prompt"], ["--num_virtual_tokens", "2"], ["--num_virtual_tokens", "12"]),
    "batch_size": ([], ["--batch_size", "2"], ["--batch_size", "4"]),
    "sequence_length": ([], ["--sequence_length", "8"], ["--sequence_length", "16"]),
    "scored_tokens": ([], [], ["--scored_tokens", "1"]),
    "dtype": ([], ["--dtype", "float32"], ["--dtype", "bfloat16"]),
    "method_args": ([], [], ["--method_args", '{"rank": 7}']),
    "forward_batching": ([], ["--forward_batching", "batched"], ["--forward_batching", "sequential"]),
    "anchor_decay": ([], [], ["--anchor_decay", "1"]),
    "activation_checkpointing": (["--method", "fo-sgd"], [], ["--activation_checkpointing"]),
    "model_name_or_path": ([], ["--model_name_or_path", "my-model"], ["--model_name_or_path", "opt-125m"]),
}
_HERE = "tests/unit/cli/test_command_options.py::"


def _turned(table: dict[str, Any], test: str) -> dict[str, str]:
    return dict.fromkeys(table, _HERE + test)


_LOADING = _turned(MODEL, "test_an_option_of_the_model_acts") | {
    "trust_remote_code": _HOSTILE,
    "max_memory": _DISK,
    "offload_dir": _DISK,
    "offload_blocks": _OFFLOAD + "test_where_no_blocks_are_found_the_reason_is_told",
    "n_threads": _GGUF + "test_other_threads_change_nothing_but_how_many_work",
    "n_gpu_layers": _GGUF + "test_blocks_on_a_gpu_need_a_llama_cpp_for_one",
    "n_ctx": _GGUF + "test_a_smaller_context_is_that_of_the_data",
    "n_ubatch": _GGUF + "test_an_option_of_llama_cpp_changes_the_last_bits_at_most",
    "cache_type": _GGUF + "test_an_option_of_llama_cpp_changes_the_last_bits_at_most",
    "tokenizer_name": _GGUF + "test_the_tokenizer_of_the_checkpoint_can_be_given",
}
_ROWS = _turned(DATA, "test_an_option_of_the_data_acts") | {
    "task": "tests/unit/tasks/test_tasks_rendered.py::test_every_task_goes_from_rows_to_metrics",
    "problem_type": "tests/unit/training/test_model_families.py::test_a_head_is_trained_saved_and_evaluated",
    "loss_over": "tests/unit/tasks/test_protocol_options.py::test_the_loss_over_tokens_is_that_of_transformers",
    "tools": _CHAT,
    "chat_template_kwargs": _CHAT,
    "reward": _LOGGED,
    "guard_task": _LOGGED,
    "guard_file": _ACCURACY,
    "attribute": _INFLUENCE,
}
_REPLAYED = {"base": _RUN, "output_dir": _RUN, "use_cpu": GPU, "trust_remote_code": _HOSTILE}

#: command -> option -> the test that shows what it does.
ROWS: dict[str, dict[str, str]] = {
    "train": _LOADING | _ROWS | _turned(SCHEME, "test_an_option_of_the_scheme_acts") | {
        "overwrite_output_dir": _CLI + "test_a_folder_that_holds_a_run_is_left_alone_unless_told",
        "config": _CLI + "test_flags_override_the_yaml_file",
        "protocol": "tests/unit/training/test_protocols.py::test_the_record_of_a_run_says_both",
    },
    "eval": _LOADING | {name: place for name, place in _ROWS.items() if name in {f.name for f in dataclasses.fields(EvalDataArguments)}} | {
        "per_device_eval_batch_size": _HERE + "test_an_option_of_eval_acts",
        "seed": _HERE + "test_an_option_of_eval_acts",
        "reward_weights": _WEIGHED,
        "max_completion_length": _WEIGHED,
        "num_completions_to_print": _WEIGHED,
        "objective": "tests/unit/training/test_masked_runs.py::test_a_run_is_evaluated_replayed_and_resumed_with_its_masked_head",
        "use_cpu": GPU,
        "output_file": _RUN,
        "vote": "tests/unit/cli/test_vote_command.py::test_a_vote_is_the_majority_of_its_points",
        "adapter": _GGUF + "test_eval_gives_the_metrics_of_the_run",
        "config": _HERE + "test_an_option_of_eval_acts",
    },
    "prompt": _LOADING | {
        **dict.fromkeys(
            ("data_dir", "train_file", "eval_file", "templates", "rounds", "keep", "num_search", "num_dev", "num_eval", "max_length"),
            _PROMPT + "test_options_of_the_search_act",
        ),
        **dict.fromkeys(("truncate", "seed", "per_device_eval_batch_size"), _PROMPT + "test_options_of_the_search_act"),
        **dict.fromkeys(("task", "output_dir"), _PROMPT + "test_the_found_file_evaluates_and_trains"),
        **dict.fromkeys(("max_new_tokens", "temperature"), _ADVICE + "test_a_local_model_replies_by_its_seed_and_leaves_the_generator"),
        "llm": _ADVICE + "test_a_wrong_request_is_one_sentence",
        "use_cpu": GPU,
        "config": _HERE + "test_an_option_of_eval_acts",
    },
    "bench": {
        "grid": _BENCH, "output_dir": _BENCH, "data_dir": _BENCH, "processes": _BENCH, "threads": _BENCH,
        "trust_remote_code": _HOSTILE,
        "keep_models": _HERE + "test_an_option_of_bench_acts", "dry_run": _HERE + "test_an_option_of_bench_acts",
        "report": _HERE + "test_an_option_of_bench_acts",
    },
    "replay": _REPLAYED | {
        "journal": _RUN, "step": _RUN, "verify": _RUN, "merge": _HERE + "test_options_of_replay_that_would_do_nothing_are_refused",
        "offload": _DISK, "max_memory": _DISK, "offload_dir": _DISK, "offload_blocks": _LOADING["offload_blocks"],
    },
    "merge": _REPLAYED | {"base": _MERGE, "output_dir": _MERGE, "journals": _MERGE, "weights": _MERGE},
    "influence": dict.fromkeys(("run", "top", "by", "out", "plot"), _INFLUENCE),
    "orders": {
        **dict.fromkeys(["base", "run", "order", "checks", "out", "output_dir"], _TOLD),
        **dict.fromkeys(("position", "places"), _ORDERS + "test_a_row_has_a_loss_for_each_place"),
        "use_cpu": GPU,
        "trust_remote_code": _HOSTILE,
    },
    "convert": dict.fromkeys(("checkpoint", "out", "outtype", "overwrite"), _CONVERT),
    "report": dict.fromkeys(("runs", "out"), _PUSH + "test_report.py::test_a_page_shows_results_options_and_commands"),
    "export": dict.fromkeys(("run", "to", "output_dir"), _EXPORT + "test_a_low_rank_run_is_an_adapter")
    | {"rank": _EXPORT + "test_what_a_rank_loses_is_said", "outtype": _EXPORT + "test_a_run_becomes_a_gguf_file"}
    | {"base": _EXPORT + "test_the_base_may_have_moved", "trust_remote_code": _HOSTILE},
    "push": dict.fromkeys(("run", "repo", "private", "base_model"), _PUSH + "test_hub.py::test_a_pushed_run_loads_and_replays")
    | dict.fromkeys(("license", "dataset"), _PUSH + "test_published_files.py::test_a_published_run_is_whole_and_tells_no_paths")
    | {"dry_run": _PUSH + "test_published_files.py::test_an_unfinished_or_damaged_run_is_not_pushed"}
    | {"revision": _PUSH + "test_hub.py::test_a_pushed_run_loads_and_replays"},
    "verify": {"run": _RUN},
    "estimate": _turned(PREDICTED, "test_an_option_of_estimate_is_in_what_is_predicted") | {
        "trust_remote_code": _HOSTILE, "method": _DRAWS, "chart": _DRAWS, "json": _DRAWS, "device": _MEASURES, "measure": _MEASURES,
        "memory": _ESTIMATE + "test_what_fits_a_card_does_and_twice_as_much_does_not",
        "objective": "tests/unit/training/test_masked_runs.py::test_memory_is_estimated_with_the_masked_head",
        "exact": _HERE + "test_options_of_estimate_that_would_do_nothing_are_refused",
    },
    "quickstart": dict.fromkeys(
        ("output_dir", "seed", "steps", "adam_steps", "part"), _CLI + "test_quickstart_compares_forward_only_with_backprop"
    ),
    "methods": {"name": _CLI + "test_methods_and_tasks_list_their_registries"},
    "tasks": {"name": _CLI + "test_methods_and_tasks_list_their_registries"},
}  # fmt: skip


class Caught(Exception):
    pass


def options_of(command: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options of a command, by its parser."""
    if command == "prompt":
        return {field.name for each in (ModelArguments, PromptArguments) for field in dataclasses.fields(each)} | {"config"}
    if command in ("train", "eval"):
        training = command == "train"
        own = (DataArguments, Scheme, OutputArguments) if training else (EvalDataArguments, EvaluationArguments)
        return (
            {field.name for each in (ModelArguments, *own) for field in dataclasses.fields(each)}
            | {"config"}
            | ({"protocol"} if training else set())
        )
    if command in ("methods", "tasks"):
        return {"name"}
    found: set[str] = set()

    def parse(self: CommandParser, argv: Any) -> Any:
        found.update(action.dest for action in self._actions if action.dest != "help")
        raise Caught

    monkeypatch.setattr(CommandParser, "parse", parse)
    module, _, function = COMMANDS[command][0].partition(":")
    with pytest.raises(Caught):
        getattr(importlib.import_module(module), function)([])
    return found


def test_every_command_has_a_table() -> None:
    assert set(ROWS) == set(COMMANDS)
    assert set(run_config.option_parser().options()) == set(ROWS["train"]) | {f.name for f in dataclasses.fields(zotune.ZOConfig)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_row(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ROWS[command]) == options_of(command, monkeypatch)


def test_the_tests_named_in_the_tables_exist() -> None:
    places = {place for rows in ROWS.values() for place in rows.values()} - {GPU}
    for file in {place.partition("::")[0] for place in places}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing = {place for place in places if place.startswith(f"{file}::")} - {f"{file}::{name}" for name in functions}
        assert not missing


# --- what the options do ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    save_model(folder / "my-model")
    save_model(folder / "second")
    save_data(folder)
    (folder / "rows.jsonl").write_text((folder / "data/sst2/train.jsonl").read_text().replace("is", "was"))
    (folder / "other/sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"other/sst2/{split}.jsonl").write_text((folder / "rows.jsonl").read_text())
    (folder / "renamed.jsonl").write_text('{"body": "a film", "other": "the plot", "label": 1}\n' * 3)
    (folder / "text.jsonl").write_text('{"text": "a film"}\n{"text": "the plot"}\n')
    card = (
        "configs:\n- {config_name: default, default: true, data_files: [{split: train, path: a.csv}, {split: validation, path: b.csv}]}\n"
    )
    card += "- {config_name: other, data_files: [{split: train, path: b.csv}, {split: validation, path: a.csv}]}\n"
    (folder / "hub-layout").mkdir()
    (folder / "hub-layout/README.md").write_text(f"---\n{card}---\n")
    for name, sentence in (("a", "a film"), ("b", "the plot")):
        (folder / f"hub-layout/{name}.csv").write_text(f"sentence,label\n{sentence},1\n{sentence},0\n")
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")


def differ(table: dict[str, Any], name: str, look: Any) -> bool:
    beside, *values = table[name]
    found = [look(**{**beside, **({} if value is None else {name: value})}) for value in values]
    return found[0] != found[1]


@pytest.mark.parametrize("name", DATA)
def test_an_option_of_the_data_acts(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained("my-model")

    def look(**options: Any) -> str:
        usual = {} if "dataset_name" in options else {"data_dir": "data"}
        try:
            data = prepare(tokenizer, None, **{"task": "sst2", **usual, **options})
        except ValueError as error:
            return str(error)
        return str((data.train, data.dev, data.eval, data.train_objective))

    assert differ(DATA, name, look)


@pytest.mark.parametrize("name", SCHEME)
def test_an_option_of_the_scheme_acts(name: str) -> None:
    plan = plan_model(ModelArguments("my-model"), "test")

    def look(**options: Any) -> list[Any]:
        model, _ = load_model(plan, ModelArguments("my-model"), torch.device("cpu"))
        model = schemes.apply(model, Scheme(**options))
        shapes = [(name, parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad]
        scales = [str(module.scaling) + str(module.lora_dropout) for module in model.modules() if hasattr(module, "lora_dropout")]
        return [shapes, scales]

    assert differ(SCHEME, name, look)


@pytest.mark.parametrize("name", MODEL)
def test_an_option_of_the_model_acts(name: str) -> None:
    def look(**options: Any) -> tuple[Any, ...]:
        args = ModelArguments(**{"model_name_or_path": "my-model", **options})
        plan = plan_model(args, "test")
        model, _ = load_model(plan, args, torch.device("cpu"))
        layers = {type(module).__name__ for module in model.modules()}
        dtypes = {parameter.dtype for parameter in model.parameters()}
        return plan.name, layers, dtypes, model.config._attn_implementation, stream_of(model) is not None

    assert differ(MODEL, name, look)


@pytest.mark.parametrize("name", PREDICTED)
def test_an_option_of_estimate_is_in_what_is_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    beside, *values = PREDICTED[name]
    for words in values:
        taken: list[Any] = []
        usual = CommandParser.parse

        def parse(self: CommandParser, argv: Any, taken: list[Any] = taken, usual: Any = usual) -> Any:
            taken.append(usual(self, argv))
            raise Caught

        with monkeypatch.context() as patched, pytest.raises(Caught):
            patched.setattr(CommandParser, "parse", parse)
            given = [*beside, *words]
            usual_words = {"--method": "lozo", "--batch_size": "2", "--sequence_length": "16", "--model_name_or_path": "my-model"}
            estimate.main([*given, *(word for flag, value in usual_words.items() if flag not in given for word in (flag, value))])
        (args,) = taken
        (method,) = estimate.methods_of(args.method, args.method_args)
        found.append(str(estimate.workload(args, method, args.dtype or "float32")))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "lozo", "--activation_checkpointing"], "is an option of first-order methods"),
        (["--method", "fo-sgd", "--forward_batching", "batched"], "is an option of zeroth-order methods"),
        (["--method", "lozo", "--exact", "--measure"], "leave --exact out"),
    ],
)
def test_options_of_estimate_that_would_do_nothing_are_refused(words: list[str], message: str, capsys: Any) -> None:
    result = run_command(capsys, "estimate", "--model_name_or_path", "my-model", "--sequence_length", "16", *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_an_option_of_eval_acts(place: Path, capsys: Any) -> None:
    words = ["eval", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--output_file", "-"]
    (place / "eval.yaml").write_text("num_eval: 6\n")
    whole = run_command(capsys, *words).out.partition('"metrics"')[2].partition('"seconds"')[0]
    losses = {whole}
    for seed in ("1", "2"):
        result = run_command(capsys, *words, "--config", "eval.yaml", "--seed", seed, "--per_device_eval_batch_size", "2")
        assert result.code == 0 and '"examples": 6' in result.out
        losses.add(result.out.partition('"metrics"')[2].partition('"seconds"')[0])
    assert len(losses) == 3


def test_an_option_of_bench_acts(place: Path, capsys: Any) -> None:
    grid = "models: [my-model]\ntasks: [sst2]\nmethods: [zero-shot]\nseeds: [0]\nbudget: {steps: 2}\n"
    (place / "grid.yaml").write_text(grid)
    words = ["bench", "grid.yaml", "--data_dir", "data", "--output_dir", "bench"]
    planned = run_command(capsys, *words, "--dry_run")
    assert planned.code == 0 and "zotune train" in planned.out and not Path("bench").exists()
    report = run_command(capsys, *words, "--report")
    assert report.code == 1 and "1 runs failed or are missing" in report.out


def test_options_of_replay_that_would_do_nothing_are_refused(place: Path, capsys: Any) -> None:
    run = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "2", "--learning_rate", "1e-3"]
    assert run_command(capsys, "train", *run, "--output_dir", "run", "--use_cpu").code == 0
    for option in (["--step", "1"], ["--output_dir", "x"], ["--merge"], ["--offload", "disk"], ["--use_cpu"]):
        result = run_command(capsys, "replay", "--verify", "run", *option)
        assert result.code == 2 and f"so {option[0]} would have no effect" in result.err
    result = run_command(capsys, "replay", "my-model", "run", "--output_dir", "rebuilt", "--merge")
    assert result.code == 2 and "this run trained none: leave --merge out" in result.err and not Path("rebuilt").exists()


# --- what `zotune train` refuses because it was given ---

TASK = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--output_dir", "out"]
TEXT = ["--model_name_or_path", "my-model", "--train_file", "my.jsonl", "--output_dir", "out"]
_VALUES = {
    "label_names": "labels", "include_for_metrics": "loss", "length_column_name": "n", "label_smoothing_factor": "0.1", "hub_token": "x",
    "hub_model_id": "x", "hub_revision": "x", "local_rank": "0", "eval_strategy": "steps", "eval_steps": "2", "eval_delay": "1",
    "metric_for_best_model": "loss", "per_device_eval_batch_size": "2", "eval_accumulation_steps": "1", "num_eval": "4", "run_name": "x",
    "num_train_epochs": "2", "save_steps": "2", "save_total_limit": "1", "logging_steps": "2", "project": "x", "trackio_space_id": "x",
    "trackio_bucket_id": "x", "trackio_static_space_id": "x", "train_sampling_strategy": "random", "data_seed": "1",
    "attribute_every": "2", "attribute_examples": "8",
}  # fmt: skip
_BESIDE = {
    "num_train_epochs": ["--max_steps", "2"], "eval_steps": ["--eval_strategy", "epoch"], "save_steps": ["--save_strategy", "epoch"],
    "save_total_limit": ["--save_strategy", "no"], "save_only_model": ["--save_strategy", "no"],
    "logging_steps": ["--logging_strategy", "epoch"], "overwrite_output_dir": ["--resume_from_checkpoint", "true"],
    **{name: ["--dp_noise_multiplier", "1"] for name in ("train_sampling_strategy", "data_seed", "dataloader_drop_last")},
}  # fmt: skip


@pytest.mark.parametrize("name", [*DECIDED, *CONDITIONAL])
def test_what_train_decides_or_would_ignore_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^--{name} would have no effect: .*leave --{name} out\.$"):
        run_config.parse([*TASK, f"--{name}", _VALUES.get(name, "1" if name in REWARD_FIELDS else "true"), *_BESIDE.get(name, [])])


@pytest.mark.parametrize("name", OF_EVALUATIONS)
def test_options_of_evaluations_need_evaluation_data(name: str) -> None:
    words = [f"--{name}", _VALUES.get(name, "true")]
    with pytest.raises(ValueError, match=rf"^--{name} would have no effect: there are no evaluation data"):
        run_config.parse([*TEXT, *words])
    assert run_config.parse(TEXT).training.eval_strategy == "no"
    assert run_config.parse([*TEXT, "--num_dev", "4"]).training.eval_strategy == "steps"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric_for_best_model", "acuracy"], "no metric of these data; did you mean 'accuracy': there are loss, accuracy"),
        (["--data_dir", "data", "--train_file", "rows.jsonl", "--eval_file", "rows.jsonl"], "leave data_dir out"),
    ],
)
def test_a_run_is_refused_before_its_model_is_loaded(words: list[str], message: str, capsys: Any) -> None:
    result = run_command(capsys, "train", *TASK, *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1 and not Path("out").exists()


def test_accuracy_of_plain_text_is_refused_before_training(capsys: Any) -> None:
    result = run_command(capsys, "train", *TEXT, "--num_dev", "4", "--metric_for_best_model", "accuracy")
    assert result.code == 2 and "'accuracy' is no metric of these data" in result.err and not Path("out").exists()


def test_the_full_help_says_what_is_refused(capsys: Any) -> None:
    shown = run_command(capsys, "train", "--help-all").out
    for name in ("fp16", "do_train", "fsdp", "label_names"):
        line = shown.partition(f"\n  --{name} ")[2].partition("\n  --")[0]
        assert "refused: " in line, name
