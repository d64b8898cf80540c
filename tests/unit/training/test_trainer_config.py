"""ZOConfig: names as in TrainingArguments, checked once, each refusal one sentence with the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import zotune
from zotune import ZOConfig
from zotune.training.config import settings


def config(tmp_path: Path, **options: Any) -> ZOConfig:
    return ZOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_rate_and_eps_are_measured_unless_they_are_given(tmp_path: Path) -> None:
    default = config(tmp_path)
    assert default.zo_method() == zotune.methods.lozo(eps="auto")
    assert default.learning_rate == "auto" and default.lr_scheduler_type == "warmup_stable_decay"
    assert config(tmp_path, learning_rate="1e-3", eps="0.01").zo_method().eps == 0.01


def test_without_a_rate_the_methods_own_is_taken_with_a_message(tmp_path: Path, caplog) -> None:
    made = config(tmp_path, method="jaguar-sign")
    assert made.learning_rate == zotune.methods.jaguar_sign().lr
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "no learning rate was given, and for method 'jaguar-sign' it cannot be calibrated"
    ]
    caplog.clear()
    assert config(tmp_path, method="fzoo").learning_rate == "auto" and not caplog.records
    with pytest.raises(ValueError, match="'auto' is not known for the update rule JaguarSign"):
        config(tmp_path, method="jaguar-sign", learning_rate="auto")


@pytest.mark.parametrize("method", zotune.methods.names())
def test_options_left_out_are_the_methods_own(method: str, tmp_path: Path) -> None:
    made = config(tmp_path, method=method, eps=None, learning_rate=None)
    assert made.zo_method() == zotune.methods.get(method)
    assert made.learning_rate == zotune.methods.get(method).lr


def test_options_given_reach_the_method(tmp_path: Path) -> None:
    made = config(tmp_path, method="lozo-m", eps=1e-2, num_directions=3, direction="rademacher", estimator="forward",
                  rank=4, interval=7, momentum=0.5, learning_rate=0.25)  # fmt: skip
    expected = zotune.methods.get("lozo-m", eps=1e-2, num_directions=3, direction="rademacher", estimator="forward",
                                  rank=4, interval=7, momentum=0.5)  # fmt: skip
    assert made.zo_method() == expected
    assert made.learning_rate == 0.25


def test_the_rule_and_further_options(tmp_path: Path) -> None:
    made = config(tmp_path, method="mezo", update_rule="RMSprop", update_rule_args='{"alpha": 0.9}').zo_method()
    assert made.update_rule == "RMSprop" and made.update_rule_args == {"alpha": 0.9}
    assert config(tmp_path, method="mezo-adam", method_args={"betas": [0.8, 0.9]}).zo_method().update_rule_args == {"betas": (0.8, 0.9)}


def test_a_run_is_a_thousand_steps_by_default(tmp_path: Path) -> None:
    assert config(tmp_path).max_steps == 1000
    assert config(tmp_path, max_steps=5).max_steps == 5
    epochs = config(tmp_path, num_train_epochs=2)
    assert epochs.max_steps == -1 and epochs.num_train_epochs == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "loso"}, "unknown method 'loso'; did you mean 'lozo'?"),
        ({"method": "mezo", "rank": 2}, "method 'mezo' has no option 'rank'"),
        ({"method": "lozo-m", "update_rule": "Adam"}, "method 'lozo-m' has no option 'update_rule'"),
        ({"method": "mezo", "momentum": 0.9}, "method 'mezo' has no option 'momentum'"),
        ({"method_args": {"intervall": 3}}, "did you mean 'interval'?"),
        ({"method_args": {"rank": 3}, "rank": 3}, "rank is given both as a field and in method_args"),
        ({"method_args": "[1]"}, "method_args must be a JSON object"),
        ({"update_rule_args": "{nesterov"}, "update_rule_args must be JSON such as"),
        ({"update_rule": "Adamm"}, "unknown update rule 'Adamm'"),
        ({"update_rule_args": {"betas": 1}}, "does not take the options"),
        ({"direction": "gausian"}, "gaussian"),
        ({"estimator": "center"}, "unknown estimator 'center'"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": float("nan")}, "eps must be positive, got nan"),
        ({"forward_batching": "batch"}, "unknown forward_batching 'batch'"),
        ({"directions_per": "exmaple"}, "unknown directions_per 'exmaple'; did you mean 'example'?"),
        ({"learning_rate": "automatic"}, "learning_rate must be a number or 'auto', got 'automatic'"),
        ({"method": "mezo", "update_rule": "Rprop", "learning_rate": "auto"}, "not known for the update rule Rprop; give a number"),
        ({"num_directions": 0}, "num_directions must be a whole number of at least 1"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"method": "lozo-m", "momentum": 1.0}, r"momentum must be in [0, 1), got 1.0"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"weight_decay": 0.1, "anchor_decay": 0.1}, "weight_decay shrinks the same weights toward 0; set one of them to 0"),
        ({"method": "fo-sgd", "anchor_decay": 0.1}, "it is an option of zeroth-order methods, and fo-sgd is none; leave it out"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1 (or -1 to count epochs instead), got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs must be positive, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"gradient_checkpointing": True}, "forward passes store no activations"),
        ({"activation_checkpointing": True}, "forward passes store no activations"),
        ({"bf16": True}, "load the model in that dtype (dtype=torch.bfloat16) instead"),
        ({"fp16": True}, "load the model in that dtype (dtype=torch.float16) instead"),
        ({"bf16_full_eval": True}, "load the model with dtype=torch.bfloat16 instead"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 cannot be used: no gradient is computed"),
        ({"neftune_noise_alpha": 5.0}, "its noise acts in training mode"),
        ({"deepspeed": "ds.json"}, "run without it"),
        ({"fsdp": "full_shard"}, "sharded models are not supported yet"),
        ({"torch_compile": True}, "compiled models are not supported yet"),
        ({"auto_find_batch_size": True}, "set per_device_train_batch_size"),
        ({"push_to_hub": True}, "use `zotune push RUN REPO`"),
        ({"optim": "adamw_torch"}, "choose it with method=..., update_rule=... and update_rule_args=..."),
        ({"adam_beta1": 0.8}, "update_rule_args={'betas': [..., ...]}"),
        ({"logging_nan_inf_filter": True}, "they are logged as skipped"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_fix(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        config(tmp_path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mixed_precision_by_the_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"mixed precision \(fp16\) cannot be used: load the model in that dtype"):
        config(tmp_path)


def test_settings_are_plain_json(tmp_path: Path) -> None:
    made = config(tmp_path, update_rule_args={"momentum": 0.9}, hub_token="secret")
    content = settings(made)
    assert json.loads(json.dumps(content)) == content
    assert content["method"] == "lozo" and content["update_rule_args"] == {"momentum": 0.9}
    assert "secret" not in json.dumps(content)


def test_a_command_line_is_parsed_as_for_training_arguments(tmp_path: Path) -> None:
    parser = transformers.HfArgumentParser(ZOConfig)
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--method", "mezo", "--eps", "0.01", "--max_steps", "7"]
    arguments += ["--num_directions", "2", "--update_rule_args", '{"momentum": 0.5}', "--learning_rate", "3e-4"]
    (made,) = parser.parse_args_into_dataclasses(arguments)
    assert (made.eps, made.max_steps, made.num_directions, made.learning_rate) == (0.01, 7, 2, 3e-4)
    assert made.update_rule_args == {"momentum": 0.5}
    (bare,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])
    assert bare.learning_rate == bare.eps == "auto"
    assert bare.remove_unused_columns is None and bare.max_steps == 1000
