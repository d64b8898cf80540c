"""Runs that train a GGUF file: what they leave, and what reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import disturbed
from command_cases import Result
from disturbed import Disturbance
from gguf_runs import PROMPT, RUN, SHORT, TASK, loaded, summary
from zotune.engines.gguf.adapter import read_adapter
from zotune.engines.gguf.file import GGUFFile

pytestmark = pytest.mark.usefixtures("inside")
Command = Callable[..., Result]


@pytest.fixture
def other(place: Path, trained: Path, command: Command) -> Path:
    """A run of another seed and method."""
    if not (place / "other").exists():
        assert command("train", *SHORT, *TASK, "--output_dir", "other").code == 0
    return Path("other")


def evaluated(command: Command, *words: Any) -> dict[str, float]:
    result = command("eval", "--n_threads", "1", *words, "--output_file", "-")
    assert result.code == 0, result.err
    return json.loads(result.out)["metrics"]


def updates(adapter: Path) -> dict[str, np.ndarray]:
    """The sum that an adapter adds to each matrix."""
    factors, _ = read_adapter(adapter, GGUFFile("base.gguf"))
    return {name: left @ right.T for name, (left, right) in factors.items()}


def same_bytes(one: Path, two: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


# -- what a run leaves ------------------------------------------------------------------------------------------


def test_a_run_leaves_an_adapter_and_says_what_computes(place: Path, trained: Path) -> None:
    names = {"adapter.gguf", "peft", "Modelfile", "journal.zo", "summary.json", "zotune_run.json", "curve.png", "checkpoint-2"}
    assert names <= {path.name for path in trained.iterdir()}
    begin = " ".join((place / "run.out").read_text().split()).partition(" to train on")[0]  # lines are as wide as the terminal
    total = sum(np.prod(tensor.shape) for tensor in GGUFFile("base.gguf").tensors.values())
    assert "base.gguf" in begin and "F32, by llama.cpp" in begin and f"of {total / 1e6:.2f} M parameters" in begin
    found = summary(trained)
    assert found["model"] == "base.gguf" and found["files"]["model"] == "run" and found["after"]["loss"] != found["before"]["loss"]
    assert str(place / "base.gguf") in (trained / "Modelfile").read_text() and "TEMPLATE" in (trained / "Modelfile").read_text()
    facts = read_adapter(trained / "adapter.gguf", GGUFFile("base.gguf"))[1]
    assert facts == {"base": GGUFFile("base.gguf").digest(), "method": "lozo-g", "seed": "3", "steps": "4"}


def test_eval_gives_the_metrics_of_the_run(trained: Path, command: Command) -> None:
    after = summary(trained)["after"]
    assert evaluated(command, "--model_name_or_path", "run") == after
    assert evaluated(command, "--model_name_or_path", "run/checkpoint-4") == after
    adapted = ["--model_name_or_path", "base.gguf", "--adapter", "run/adapter.gguf", "--task", "sst2", "--data_dir", "data"]
    assert evaluated(command, *adapted, "--num_eval", "12", "--seed", "3") == after
    history = json.loads((trained / "history.json").read_text())["entries"]
    (second,) = [entry["eval_loss"] for entry in history if entry.get("step") == 2 and "eval_loss" in entry]
    assert evaluated(command, "--model_name_or_path", "run/checkpoint-2")["loss"] == second != after["loss"]


def test_eval_of_a_run_takes_its_context(tmp_path: Path, command: Command) -> None:
    words = ["--model_name_or_path", "q8.gguf", "--n_ubatch", "32", "--cache_type", "f16", "--output_dir", tmp_path / "run"]
    assert command("train", *SHORT, *TASK, *words).code == 0
    after = summary(tmp_path / "run")["after"]
    assert evaluated(command, "--model_name_or_path", tmp_path / "run") == after
    assert evaluated(command, "--model_name_or_path", tmp_path / "run", "--cache_type", "f32")["loss"] != after["loss"]


def test_llama_cpps_own_interface_loads_the_adapter(trained: Path) -> None:
    from llama_cpp import Llama

    model, tokenizer = loaded(trained)
    ids = tokenizer(PROMPT)["input_ids"]
    engine = Llama("base.gguf", lora_path="run/adapter.gguf", n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    engine.eval(ids)
    theirs = torch.tensor(engine.scores[: len(ids)]).log_softmax(1)
    engine.close()
    ours = model(torch.tensor([ids])).logits[0].log_softmax(1)
    plain = loaded("base.gguf")[0](torch.tensor([ids])).logits[0].log_softmax(1)
    assert (ours - theirs).abs().max() < 5e-3 < 0.05 < (ours - plain).abs().max()


def test_the_peft_folder_is_the_update_of_the_checkpoint(trained: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, tokenizer = loaded(trained)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    base = transformers.AutoModelForCausalLM.from_pretrained("checkpoint", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, "run/peft")
    assert (adapted(ids).logits - model(ids).logits).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("rows", "plain"),
    [
        ([{"prompt": f"number {n}:", "completion": " odd" if n % 2 else " even"} for n in range(6)], True),
        ([{"text": f"the film number {n} is warm"} for n in range(6)], True),
        ([{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "odd"}]} for n in range(6)], False),
    ],
    ids=["prompt", "text", "messages"],
)
def test_own_data_train_and_only_chats_use_the_template(rows: list[Any], plain: bool, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command("train", *SHORT, "--train_file", file, "--num_dev", "2", "--output_dir", tmp_path / "run")
    assert result.code == 0, result.err
    assert ("TEMPLATE {{ .Prompt }}" in (tmp_path / "run/Modelfile").read_text()) == plain
    assert command("replay", "base.gguf", tmp_path / "run", "--output_dir", tmp_path / "again").code == 0
    assert same_bytes(tmp_path / "run", tmp_path / "again", "Modelfile", "adapter.gguf")


# -- replay, resume, merge ------------------------------------------------------------------------------------------


def test_replay_gives_the_same_bytes(trained: Path, tmp_path: Path, command: Command) -> None:
    assert command("replay", "base.gguf", "run", "--output_dir", tmp_path / "whole").code == 0
    assert same_bytes(tmp_path / "whole", trained, "adapter.gguf", "Modelfile", "peft/adapter_model.safetensors")
    assert command("replay", "base.gguf", "run", "--step", "2", "--output_dir", tmp_path / "half").code == 0
    assert same_bytes(tmp_path / "half", trained / "checkpoint-2", "adapter.gguf")


def test_a_killed_run_resumes_to_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    words = [*RUN, "--output_dir", str(tmp_path / "run")]
    first = disturbed.train(words, tmp_path / "run", Disturbance("kill", 30))
    assert first.code is None, first.error
    second = disturbed.train([*words, "--resume_from_checkpoint", "true"], tmp_path / "run", Disturbance())
    assert second.code == 0, second.error
    assert same_bytes(tmp_path / "run", trained, "journal.zo", "adapter.gguf", "Modelfile")


def test_a_run_resumes_with_what_determines_it(trained: Path, tmp_path: Path, command: Command) -> None:
    cases = {
        "n_ubatch was 1024 and is 64": ["--n_ubatch", "64"],
        "cache_type was 'f32' and is 'f16'": ["--cache_type", "f16"],
        "n_ctx was 0 and is 100": ["--n_ctx", "100"],
        "tokenizer_name was None and is 'checkpoint'": ["--tokenizer_name", "checkpoint"],
        "began from another base model": ["--model_name_or_path", "q8.gguf"],
    }
    for message, words in cases.items():
        result = command("train", *RUN, "--output_dir", "run", "--resume_from_checkpoint", "true", *words)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "checkpoint-4")
    (copy / "adapter.gguf").unlink()
    words = ["--output_dir", copy, "--resume_from_checkpoint", "true", "--n_threads", "2"]
    assert command("train", *RUN, *words).code == 0
    assert same_bytes(copy, trained, "journal.zo", "adapter.gguf") and summary(copy)["resumed"][0]["changed"]["n_threads"] == [1, 2]


def test_merged_runs_are_the_weighted_sum_of_their_updates(trained: Path, other: Path, tmp_path: Path, command: Command) -> None:
    result = command("merge", "base.gguf", "run", "other", "--weights", "1", "3", "--output_dir", tmp_path / "merged")
    assert result.code == 0, result.err
    merged, one, two = (updates(folder / "adapter.gguf") for folder in (tmp_path / "merged", trained, other))
    for name, update in merged.items():
        assert np.allclose(update, one.get(name, 0) / 4 + two.get(name, 0) * 3 / 4, atol=1e-6)


def test_a_run_may_begin_with_the_adapter_of_another(trained: Path, tmp_path: Path, command: Command) -> None:
    further = tmp_path / "further"
    words = [word if word != "base.gguf" else "run" for word in SHORT]
    assert command("train", *words, *TASK, "--seed", "3", "--output_dir", further).code == 0
    assert summary(further)["before"] == summary(trained)["after"]
    assert command("replay", "run", further, "--output_dir", tmp_path / "again").code == 0
    assert same_bytes(further, tmp_path / "again", "adapter.gguf")
    for base, journal in (("base.gguf", further), ("run", "run")):
        result = command("replay", base, journal, "--output_dir", tmp_path / "wrong")
        assert result.code == 2 and "is not the one the journal starts from" in result.err and not (tmp_path / "wrong").exists()
    assert command("merge", "run", further, further, "--output_dir", tmp_path / "merged").code == 0
    one, merged = updates(further / "adapter.gguf"), updates(tmp_path / "merged/adapter.gguf")
    assert all(np.allclose(one[name], merged[name], atol=1e-6) for name in one)


def test_verify_finds_a_damaged_adapter(trained: Path, tmp_path: Path, command: Command) -> None:
    assert command("verify", "run").code == 0
    shutil.copytree(trained, tmp_path / "run")
    content = bytearray((tmp_path / "run/adapter.gguf").read_bytes())
    content[-1] ^= 1
    (tmp_path / "run/adapter.gguf").write_bytes(content)
    result = command("verify", tmp_path / "run")
    assert result.code != 0 and "adapter.gguf" in result.out + result.err


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path, command: Command) -> None:
    every = ["--max_steps", "3", "--eval_steps", "1", "--save_steps", "1", "--learning_rate", "0.5", "--num_dev", "8"]
    best = ["--load_best_model_at_end", "--metric_for_best_model", "loss"]
    result = command("train", *SHORT, *TASK, *every, *best, "--output_dir", tmp_path / "run")
    assert result.code == 0, result.err
    entries = json.loads((tmp_path / "run/history.json").read_text())["entries"]
    losses = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    assert summary(tmp_path / "run")["held_out"]["loss"] == min(losses.values()) < losses[3]
    at = min(losses, key=lambda step: losses[step])
    one, two = updates(tmp_path / "run/adapter.gguf"), updates(tmp_path / f"run/checkpoint-{at}/adapter.gguf")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_without_checkpoints_a_run_leaves_its_adapter(trained: Path, tmp_path: Path, command: Command) -> None:
    assert command("train", *RUN, "--save_strategy", "no", "--output_dir", tmp_path / "run").code == 2
    words = [word for pair in zip(RUN[::2], RUN[1::2], strict=True) if pair[0] != "--save_steps" for word in pair]
    result = command("train", *words, "--save_strategy", "no", "--output_dir", tmp_path / "run")
    assert result.code == 0, result.err
    assert not list((tmp_path / "run").glob("checkpoint-*")) and same_bytes(tmp_path / "run", trained, "adapter.gguf", "journal.zo")


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("n_ubatch", 32), ("cache_type", "f16")])
def test_an_option_of_llama_cpp_changes_the_last_bits_at_most(name: str, value: Any) -> None:
    """A cache in half precision does; pieces of another length may, by the processor's kernels."""
    ids = torch.arange(200).view(4, -1) % 90 + 5
    models = [loaded("q8.gguf", **options)[0] for options in ({}, {name: value})]
    plain, changed = (model(ids).logits for model in models)
    assert (plain.log_softmax(2) - changed.log_softmax(2)).abs().max() < 0.5
    if name == "cache_type":
        assert not torch.equal(plain, changed)
    else:
        lengths = [model.engine.lib.llama_n_ubatch(model.engine._context._context) for model in models]
        assert lengths[0] != value == lengths[1]


def test_other_threads_change_nothing_but_how_many_work() -> None:
    ids = torch.arange(100).view(1, -1) % 90 + 5
    (one, _), (two, _) = loaded("q8.gguf"), loaded("q8.gguf", n_threads=2)
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert [model.engine.lib.llama_n_threads(model.engine._context._context) for model in (one, two)] == [1, 2]


def test_a_smaller_context_is_that_of_the_data(command: Command, tmp_path: Path) -> None:
    words = [*SHORT, "--task", "sst2", "--train_file", "long.jsonl", "--n_ctx", "24", "--output_dir", tmp_path / "run"]
    result = command("train", *words)
    assert result.code == 2 and "more than the model's context of 24: pass --truncate" in result.err and not (tmp_path / "run").exists()
    assert command("train", *words, "--truncate").code == 0


def test_the_tokenizer_of_the_checkpoint_can_be_given() -> None:
    (_, theirs), (_, own) = loaded("base.gguf", tokenizer_name="checkpoint"), loaded("base.gguf")
    assert theirs.name_or_path == "checkpoint" != own.name_or_path
    assert theirs(PROMPT)["input_ids"] == own(PROMPT)["input_ids"]


def test_blocks_on_a_gpu_need_a_llama_cpp_for_one() -> None:
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp is for a GPU")
    with pytest.raises(ValueError, match=r"^n_gpu_layers needs a llama\.cpp that"):
        loaded("base.gguf", n_gpu_layers=1)


def test_zero_shot_needs_no_training(command: Command, tmp_path: Path) -> None:
    words = ["--model_name_or_path", "base.gguf", "--n_threads", "1", *TASK[:4], "--num_eval", "12", "--seed", "3", "--method", "zero-shot"]
    assert command("train", *words, "--output_dir", tmp_path / "run").code == 0
    assert summary(tmp_path / "run")["after"]["loss"] > 0 and not (tmp_path / "run/adapter.gguf").exists()
