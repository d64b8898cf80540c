"""`zotune train` with baselines and schemes: the same options, the same report, the same files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from command_cases import Result, run_command, save_encoder, weights_digest
from zotune import baselines, methods, tasks
from zotune.baselines import logistic_regression
from zotune.weights.trainable_scales import quantize

pytest.importorskip("peft")
pytest.importorskip("pytorch_optimizer")

Command = Callable[..., Result]
BASICS = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--num_eval", "12"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: run_command(capsys, *words)


def summary(folder: str) -> dict:
    return json.loads(Path(folder, "summary.json").read_text())


def done(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def test_a_first_order_run_resumes_and_reports_like_any_other(workplace: Path, command: Command) -> None:
    run = [*BASICS, "--method", "fo-adamw", "--max_steps", "6", "--learning_rate", "1e-2", "--max_grad_norm", "1.0"]
    done(command(*run, "--output_dir", "whole"))
    done(command(*run, "--output_dir", "parts", "--save_steps", "2"))
    assert not Path("whole/journal.zo").exists()
    Path("parts/model.safetensors").unlink()
    done(command(*run, "--output_dir", "parts", "--save_steps", "2", "--resume_from_checkpoint", "parts/checkpoint-4"))
    assert weights_digest("whole") == weights_digest("parts")
    done(command(*BASICS, "--method", "mezo", "--learning_rate", "1e-4", "--eps", "1e-3", "--max_steps", "6", "--output_dir", "zo"))
    first, zeroth = summary("whole"), summary("zo")
    assert first.keys() == zeroth.keys()
    assert (first["steps"], first["forward_passes"], first["sequences_evaluated"]) == (6, 18, 18 * 16)
    assert (zeroth["steps"], zeroth["forward_passes"], zeroth["sequences_evaluated"]) == (6, 12, 12 * 16)
    assert all(first["before"][name] == zeroth["before"][name] for name in ("loss", "accuracy"))


def test_a_missing_package_is_named_before_any_work(workplace: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "pytorch_optimizer" else find(name, *args))
    result = command(*BASICS, "--method", "galore", "--output_dir", "run")
    assert result.code == 2 and "pip install 'zotune[optimizers]'" in result.err and not Path("run").exists()
    done(command(*BASICS, "--method", "scale", "--max_steps", "2", "--output_dir", "run"))


def test_a_run_without_a_journal_cannot_be_replayed(workplace: Path, command: Command) -> None:
    done(command(*BASICS, "--method", "zero-shot", "--output_dir", "run"))
    result = command("replay", "my-model", "run", "--output_dir", "rebuilt")
    assert result.code == 2 and "has no journal" in result.err


def test_methods_without_steps_give_what_eval_gives(workplace: Path, command: Command) -> None:
    evaluate = ["eval", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--num_eval", "12"]
    for number, (method, extra) in enumerate((("zero-shot", []), ("icl", ["--num_demonstrations", "2"]))):
        folder = f"run{number}"
        done(command(*BASICS, "--method", method, *extra, "--output_dir", folder))
        done(command(*evaluate, *extra, "--output_file", "result.json"))
        metrics = json.loads(Path("result.json").read_text())["metrics"]
        after = summary(folder)["after"]
        assert {name: after[name] for name in ("loss", "accuracy")} == {name: metrics[name] for name in ("loss", "accuracy")}
        assert summary(folder)["steps"] == summary(folder)["forward_passes"] == summary(folder)["trainable_parameters"] == 0
    assert summary("run0")["after"]["loss"] != summary("run1")["after"]["loss"]


def test_demonstrations_stand_solved_before_every_prompt(workplace: Path) -> None:
    from transformers import AutoTokenizer

    task = tasks.load("sst2", template="{sentence} :", options=[" bad", " good"])
    rows = tasks.read_jsonl("data/sst2/train.jsonl").select([0, 1])
    solved = tasks.demonstrated(task, rows)
    prompt, options = solved.render({"sentence": "a plot"})
    wanted = "".join(f"{row['sentence']} : {['bad', 'good'][row['label']]}\n\n" for row in rows)
    assert (prompt, options) == (wanted + "a plot :", (" bad", " good"))
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    shared = {"task": task, "data_dir": "data", "parts": ("eval",), "num_demonstrations": 2}
    first, again, other = (tasks.prepare(tokenizer, None, seed=seed, **shared).eval for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(ValueError, match="num_demonstrations=49, but there are 48 training rows"):
        tasks.prepare(tokenizer, None, **{**shared, "num_demonstrations": 49})


def test_a_linear_probe_learns_what_the_words_say(workplace: Path, command: Command) -> None:
    done(command(*BASICS, "--method", "linear-probe", "--output_dir", "probe"))
    found = summary("probe")
    assert found["after"]["accuracy"] > 0.9 > found["before"]["accuracy"]
    assert (found["forward_passes"], found["sequences_evaluated"]) == (3, 48)
    assert load_file("probe/linear_probe.safetensors")["weight"].shape == (2, 16)


def test_the_probe_is_at_its_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    features, answers = torch.randn(50, 4, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    probe = logistic_regression.fit(features, answers, 3, l2=0.1)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    standard = (features.double() - probe.mean) / probe.deviation
    loss = torch.nn.functional.cross_entropy(standard @ weight.T + bias, answers) + 0.05 * weight.square().sum()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [weight, bias])) < 1e-6
    assert standard.mean(dim=0).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:no batched evaluation")
@pytest.mark.parametrize("scheme", ["prompt", "head"])
def test_a_schemes_run_evaluates_and_replays(scheme: str, workplace: Path, command: Command) -> None:
    run = [*BASICS, "--scheme", scheme, "--method", "mezo", "--learning_rate", "1e-2", "--eps", "1e-3", "--max_steps", "3"]
    done(command(*run, "--output_dir", "run"))
    done(command("eval", "--model_name_or_path", "run", "--output_file", "result.json"))
    assert json.loads(Path("result.json").read_text())["metrics"]["loss"] == pytest.approx(summary("run")["after"]["loss"], rel=1e-6)
    done(command("replay", "my-model", "run", "--output_dir", "rebuilt"))
    name = "model.safetensors" if scheme == "head" else "adapter_model.safetensors"
    assert weights_digest("run", name) == weights_digest("rebuilt", name)
    assert Path("run/model.safetensors").exists() == (scheme == "head")


def test_scales_train_resume_replay_and_save_as_ordinary_weights(workplace: Path, command: Command) -> None:
    """QZO: the whole numbers of every layer stay, so a trained row is a multiple of the row as it was held."""
    run = [*BASICS, "--quantize", "int8", "--scheme", "scales", "--method", "mezo", "--learning_rate", "1e-6", "--eps", "1e-4"]
    run += ["--max_steps", "6"]
    done(command(*run, "--output_dir", "whole"))
    done(command(*run, "--output_dir", "parts", "--save_steps", "2"))
    Path("parts/model.safetensors").unlink()
    done(command(*run, "--output_dir", "parts", "--save_steps", "2", "--resume_from_checkpoint", "parts/checkpoint-4"))
    assert weights_digest("whole") == weights_digest("parts")
    done(command("replay", "my-model", "whole", "--output_dir", "rebuilt"))
    assert weights_digest("whole") == weights_digest("rebuilt")
    done(command("eval", "--model_name_or_path", "whole", "--output_file", "result.json"))
    assert json.loads(Path("result.json").read_text())["metrics"]["loss"] == pytest.approx(summary("whole")["after"]["loss"], rel=1e-5)
    base, trained = load_file("my-model/model.safetensors"), load_file("whole/model.safetensors")
    held = quantize(LlamaForCausalLM.from_pretrained("my-model")).state_dict()
    assert base.keys() == trained.keys()
    for name, weight in trained.items():
        codes = held.get(name.removesuffix("weight") + "quantized")
        if codes is None:
            assert torch.equal(weight, base[name])
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        assert torch.allclose(weight, scale * codes, rtol=1e-5)
        assert not torch.equal(scale.squeeze(1), held[name.removesuffix("weight") + "scale"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheme", "scales"], "it needs --quantize int8"),
        (["--scheme", "scales", "--quantize", "int4"], "it needs --quantize int8"),
        (["--scheme", "scales", "--quantize", "int8", "--offload", "disk"], "leave --offload out"),
        (["--scheme", "scales", "--quantize", "int8", "--method", "lozo"], "trains vectors only: choose a method in full space"),
        (["--method", "qes"], "it needs --quantize int8 or int4, and --scheme full"),
        (["--method", "fo-adam"], "did you mean 'fo-adamw'"),
        (["--method", "mezo", "--max_grad_norm", "1"], "no gradient is computed"),
        (["--method", "mezo", "--num_demonstrations", "3"], "is an option of --method icl"),
        (["--method", "zero-shot", "--scheme", "lora"], "a --scheme has no effect"),
        (["--method", "lozo", "--scheme", "bias"], "this model has no bias"),
        (["--method", "mkor", "--scheme", "prompt"], "mkor makes no sense with --scheme prompt: no Linear layer"),
        (["--method", "fo-sgd", "--scheme", "prefix", "--activation_checkpointing", "true"], "leave one of them out"),
        (["--method", "fo-sgd", "--lora_r", "4"], "--lora_r is an option of --scheme lora, not of full"),
        (["--method", "fo-sgd", "--scheme", "lora", "--trainable", "q"], "--trainable is an option of --scheme full"),
        (["--method", "fo-sgd", "--trainable", "layers.9"], "matches no parameter"),
        (["--method", "lozo-e", "--scheme", "lora", "--lora_dropout", "0.1"], "leave it at 0"),
        (["--method", "icl", "--num_demonstrations", "30"], "more than the model's context"),
    ],
)
def test_wrong_requests_leave_nothing_behind(words: list[str], message: str, workplace: Path, command: Command) -> None:
    result = command(*BASICS, *words, "--output_dir", "run")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    assert not Path("run").exists()


def test_a_linear_probe_refuses_an_encoder(workplace: Path, command: Command) -> None:
    save_encoder(workplace / "encoder")
    words = ["train", "--model_name_or_path", "encoder", "--task", "sst2", "--data_dir", "data", "--output_dir", "run"]
    result = command(*words, "--method", "linear-probe")
    assert result.code == 2 and "an encoder's head alone" in result.err
    done(command(*words, "--method", "fo-adamw", "--scheme", "head", "--max_steps", "2"))


def test_zotune_methods_lists_and_describes_all(command: Command) -> None:
    listed = done(command("methods")).out
    for name in (*methods.names(), *baselines.names()):
        assert f"\n {name} " in listed or f"\n{name} " in listed, name
    for name in baselines.names():
        assert "State:" in done(command("methods", name)).out


# -- on a real model --------------------------------------------------------------------------------------------------------------------

#: Learning rates at which eight steps on sixteen sentences fit them better with the small language model.
RATES = {"fo-sgd": 1e-2, "adahessian": 1e-3, "galore": 3e-4, "golore": 3e-4, "mkor-h": 1e-2, "hybrid": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in baselines.names() if baselines.get(name).kind == "backward"])
def test_a_baseline_fits_real_sentences(name: str, tiny_lm: Path, data_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zotune.objectives.losses import objective

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32, num_hidden_layers=2)
    data = tasks.prepare(tokenizer, model.config, task="sst2", data_dir=data_dir, num_train=32, objective="choices", parts=("train",))
    shortest = sorted(data.train or [], key=lambda example: len(example["prompt_ids"]))[:16]
    batch = data.collate_train(shortest)
    optimizer = baselines.optimizer_class(baselines.get(name))(model, name, lr=RATES.get(name), max_steps=8)
    losses = [float(optimizer.step(objective("choices", model), batch)) for _ in range(8)]
    assert min(losses[-2:]) < 0.9 * losses[0]
