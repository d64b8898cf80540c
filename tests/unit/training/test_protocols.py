"""`--protocol`: what the papers' published code fixes, what overrides it, and the record of both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from command_cases import run_command, save_data, save_masked, save_model
from zotune.training import protocols, run_config

PARSER = run_config.option_parser()


def options(name: str, model: str, task: str, *words: str) -> dict[str, Any]:
    record = parsed(name, model, task, *words).protocol
    assert record is not None and record.name == name
    return dict(record.options)


def parsed(name: str, model: str, task: str, *words: str) -> run_config.RunConfig:
    return run_config.parse(["--protocol", name, "--model_name_or_path", model, "--task", task, *words, "--output_dir", "run"], PARSER)


OPT, ROBERTA = "facebook/opt-13b", "FacebookAI/roberta-large"
SIZES = {"num_train": 1000, "num_dev": 500, "num_eval": 1000}
COMMON = {
    "bos_token": "<s>", "template": "mezo", "dtype": "float16", "max_length": 2048, "truncate": True, "per_device_train_batch_size": 16,
    "max_steps": 20000, "lr_scheduler_type": "constant", "eval_steps": 4000, "save_steps": 4000, "train_sampling_strategy": "random",
    "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1,
}  # fmt: skip


def test_mezo_sets_what_its_script_for_opt_does() -> None:
    expected = COMMON | SIZES | {"method": "mezo", "objective": "choices", "eps": 1e-3, "learning_rate": 1e-7}
    assert options("mezo", OPT, "sst2") == expected


@pytest.mark.parametrize("task", ["copa", "record", "squad", "drop"])
def test_mezo_trains_these_tasks_on_tokens(task: str) -> None:
    found = options("mezo", OPT, task)
    assert (found["objective"], found["loss_over"]) == ("lm", "tokens")
    assert found["num_dev"] == (100 if task == "copa" else 500)


def test_mezo_has_rates_of_its_own_for_an_adapter() -> None:
    lora = parsed("mezo", OPT, "rte", "--scheme", "lora")
    assert lora.protocol is not None and lora.protocol.grid == {"learning_rate": [1e-4, 5e-5]}
    assert (lora.training.eps, lora.training.learning_rate, lora.scheme.lora_target_modules) == (1e-2, 5e-5, ["q_proj", "v_proj"])
    prefix = parsed("mezo", OPT, "rte", "--scheme", "prefix")
    assert (prefix.training.eps, prefix.training.learning_rate, prefix.scheme.num_virtual_tokens) == (1e-1, 1e-3, 5)


def test_mezo_of_baselines() -> None:
    assert options("mezo", OPT, "sst2", "--method", "icl") == {
        "bos_token": "<s>", "template": "mezo", "dtype": "float16", "max_length": 2048, "truncate": True, "num_eval": 1000,
        "num_demonstrations": 32, "demonstrations_per": "example",
    }  # fmt: skip
    assert options("mezo", OPT, "sst2", "--method", "linear-probe")["method_args"] == {"folds": 5}
    tuned = parsed("mezo", OPT, "sst2", "--method", "fo-adamw").training
    assert (tuned.max_steps, tuned.num_train_epochs, tuned.per_device_train_batch_size, tuned.learning_rate) == (-1, 5, 8, 1e-5)
    assert (tuned.lr_scheduler_type, tuned.eval_strategy, tuned.save_strategy) == ("linear", "epoch", "epoch")


def test_an_encoder_gets_the_few_shot_protocol_with_masks() -> None:
    found = options("mezo", ROBERTA, "mnli")
    assert found == {
        "method": "mezo", "objective": "mlm", "template": "mask", "k_shot": 16, "num_dev": 48, "num_eval": 1000, "max_length": 256,
        "truncate": True, "dtype": "float32", "train_sampling_strategy": "random", "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy", "save_total_limit": 1, "per_device_train_batch_size": 64, "max_steps": 100000,
        "lr_scheduler_type": "constant", "eval_steps": 10000, "save_steps": 10000, "eps": 1e-3, "learning_rate": 1e-6,
    }  # fmt: skip
    many = options("mezo", ROBERTA, "sst2", "--k_shot", "512")
    assert (many["num_dev"], many["max_length"]) == (1024, 128)


def test_lozo_is_mezo_with_a_rank_and_an_interval() -> None:
    differing = {"method": "lozo", "rank": 2, "interval": 50}
    assert options("lozo", OPT, "sst2") == options("mezo", OPT, "sst2") | differing
    assert options("lozo", ROBERTA, "rte", "--method", "lozo-m").items() >= {"rank": 4, "interval": 100, "momentum": 0.9}.items()


def test_fzoo_divides_the_rate_of_its_code_by_eps() -> None:
    found = options("fzoo", OPT, "sst2")
    assert found == options("mezo", OPT, "sst2") | {"method": "fzoo", "eps": 1e-4, "learning_rate": 5e-5 * 1e-4, "num_directions": 8}


def test_zo_bench_has_a_sweep_for_each_method_and_scheme() -> None:
    found = parsed("zo-bench", "facebook/opt-1.3b", "sst2", "--scheme", "prompt")
    assert found.protocol is not None
    assert found.protocol.grid == {"learning_rate": [1e-3, 1e-4, 1e-5, 1e-6], "eps": [1e-2, 1e-3, 1e-4]}
    assert found.scheme.num_virtual_tokens == 10 and found.data.bos_token is None
    assert (found.training.eval_steps, found.training.max_steps, found.data.objective) == (500, 20000, "choices")
    assert options("zo-bench", OPT, "winogrande").items() >= {"template": "zo-bench", "objective": "lm", "num_dev": 100}.items()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("mzeo", OPT, "sst2"), "unknown protocol 'mzeo'; did you mean 'mezo'"),
        (("mezo", ROBERTA, "boolq"), "the protocol mezo has prompts with a mask for sst2"),
        (("fzoo", ROBERTA, "sst2"), "the protocol fzoo has no settings of encoders in its published code"),
    ],
)
def test_what_a_protocol_does_not_have_is_refused(words: tuple[str, str, str], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parsed(*words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_protocol_does_not_say_is_said() -> None:
    record = parsed("lozo", OPT, "trec").protocol
    assert record is not None and "template" not in record.options
    assert record.notes == ("the protocol lozo names no prompt and no loss for these data, so those of zotune are taken",)


def test_a_method_without_a_published_rate_is_named() -> None:
    record = parsed("mezo", OPT, "sst2", "--method", "lozo-g").protocol
    assert record is not None
    assert record.notes == ("the protocol mezo has no rate of lozo-g with the scheme full: zotune's is taken",)
    given = parsed("mezo", OPT, "sst2", "--method", "lozo-g", "--learning_rate", "1e-3").protocol
    assert given is not None and not given.notes


def test_given_options_override_and_replace() -> None:
    config = parsed("mezo", OPT, "copa", "--learning_rate", "1e-6", "--eps", "0.001", "--num_train_epochs", "2", "--objective", "choices")
    record = config.protocol
    assert record is not None and record.overridden == {"learning_rate": [1e-7, 1e-6], "objective": ["lm", "choices"]}
    assert config.training.max_steps == -1 and config.training.num_train_epochs == 2 and config.data.loss_over == "examples"
    assert "loss_over" not in record.options and "max_steps" not in record.options


def test_every_rule_names_options_that_exist() -> None:
    known = PARSER.options()
    for name in protocols.names():
        for rule in protocols.load(name).rules:
            assert not (rule.set.keys() | rule.grid.keys()) - known.keys()
            assert not (rule.where.keys() | rule.unless.keys()) - {"model", "family", "task", "scheme", "method", "kind", "objective"}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_record_of_a_run_says_both(kind: str, tmp_path, monkeypatch, capsys) -> None:
    (save_model if kind == "decoder" else save_masked)(tmp_path / "model")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    more = ["--num_dev", "8", "--num_train", "16"] if kind == "decoder" else ["--k_shot", "4"]
    words = ["train", "--protocol", "mezo", "--model_name_or_path", "model", "--task", "sst2", "--data_dir", "data", "--output_dir", "run"]
    words += [*more, "--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--learning_rate", "1e-3", "--dtype", "float32"]
    result = run_command(capsys, *words, "--use_cpu")
    assert result.code == 0, result.err
    for file in ("zotune_run.json", "summary.json"):
        record = json.loads((tmp_path / "run" / file).read_text())["protocol"]
        assert record["name"] == "mezo" and record["options"]["objective"] == ("choices" if kind == "decoder" else "mlm")
        assert record["overridden"]["learning_rate"] == [1e-7 if kind == "decoder" else 1e-6, 1e-3]
    if kind == "decoder":
        assert run_command(capsys, *words, "--use_cpu", "--resume_from_checkpoint").code == 0
