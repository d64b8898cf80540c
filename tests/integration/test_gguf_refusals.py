"""What does not fit a GGUF file is refused: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from command_cases import Result
from gguf_files import write_model
from gguf_runs import RUN, TASK

pytestmark = pytest.mark.usefixtures("inside")
Command = Callable[..., Result]

BAD_OPTIONS = {
    "writes weights": (["--method", "mezo"], "mezo writes the weights themselves"),
    "backward": (["--method", "fo-adamw"], "fo-adamw goes backward, which an engine cannot: use one that trains low-rank factors"),
    "both": (["--method", "hybrid"], "hybrid goes backward"),
    "hidden states": (["--method", "linear-probe"], "linear-probe reads hidden states"),
    "lora": (["--scheme", "lora"], "which become a LoRA adapter: leave --scheme lora out"),
    "prefix": (["--scheme", "prefix"], "leave --scheme prefix out"),
    "head": (["--scheme", "head"], "leave --scheme head out"),
    "classifier": (["--objective", "classifier"], "--objective classifier trains a new head: use lm or choices"),
    "quantize": (["--quantize", "int8"], "--quantize is an option of torch models"),
    "offload": (["--offload", "disk"], "leave --offload out"),
    "max_memory": (["--max_memory", "1GiB"], "--max_memory is an option of --offload"),
    "dtype": (["--dtype", "bfloat16"], "leave --dtype out"),
    "attention": (["--attn_implementation", "eager"], "--attn_implementation is an option of torch models"),
    "decay": (["--weight_decay", "0.1"], "set weight_decay=0"),
    "batched": (["--forward_batching", "batched"], "leave forward_batching at 'auto'"),
    "no threads": (["--n_threads", "-1"], "--n_threads must be at least 0, not -1"),
    "many threads": (["--n_threads", "513"], "--n_threads must be at most 512, not 513"),
    "layers": (["--n_gpu_layers", "-2"], "--n_gpu_layers must be at least -1"),
    "small batch": (["--n_ubatch", "8"], "--n_ubatch must be at least 32, not 8"),
    "cache": (["--cache_type", "q8_0"], "--cache_type: unknown value 'q8_0' (one of f32, f16)"),
    "wide context": (["--n_ctx", "513"], "--n_ctx 513 is more than the 512 tokens that"),
    "no tokenizer": (["--tokenizer_name", "data"], "cannot load a model from the folder data"),
    "other tokenizer": (["--tokenizer_name", "my-model"], "does not match the given tokenizer"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_that_does_not_fit_is_refused(name: str, place: Path, command: Command) -> None:
    words, message = BAD_OPTIONS[name]
    if name == "other tokenizer":
        from command_cases import save_model

        save_model(place / "my-model")
    result = command("train", *RUN, "--output_dir", "refused", *words)
    assert (result.code, result.err.count("\n")) == (2, 1) and message in result.err, result.err
    assert not Path("refused").exists()


def _text(place: Path) -> None:
    (place / "bad.gguf").write_text("no model\n")


def _truncated(place: Path) -> None:
    (place / "bad.gguf").write_bytes((place / "q8.gguf").read_bytes()[:-1000])


def _unknown(place: Path) -> None:
    (place / "bad.gguf").write_bytes((place / "q8.gguf").read_bytes().replace(b"llama", b"lxama"))


def _split(place: Path) -> None:
    write_model(place / "split.gguf", split_max_tensors=12)
    shutil.move(place / "split-00001-of-00002.gguf", place / "bad-00001-of-00002.gguf")


BAD_FILES: dict[str, tuple[Callable[[Path], None] | None, str, str]] = {
    "text": (_text, "bad.gguf", "bad.gguf is no GGUF file"),
    "safetensors": (None, "checkpoint/model.safetensors", "but a safetensors file: convert its folder with `zotune convert`"),
    "pickle": (lambda place: torch.save({"a": torch.zeros(2)}, place / "bad.pt"), "bad.pt", "is no GGUF file, but a zip or PyTorch file"),
    "adapter": (None, "run/adapter.gguf", "is an adapter, no model"),
    "truncated": (_truncated, "bad.gguf", "is truncated"),
    "unknown": (_unknown, "bad.gguf", "unknown model architecture: 'lxama'"),
    "part missing": (_split, "bad-00001-of-00002.gguf", "bad-00002-of-00002.gguf is missing beside it"),
    "no file": (None, "nowhere.gguf", "there is no file 'nowhere.gguf'"),
    "a folder of files": (None, ".", "is a folder with GGUF files: give one of them"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_model_is_refused(name: str, place: Path, trained: Path, command: Command) -> None:
    make, file, message = BAD_FILES[name]
    if make is not None:
        make(place)
    for words in (
        ["train", *RUN, "--model_name_or_path", file, "--output_dir", "refused"],
        ["eval", "--model_name_or_path", file, *TASK[:4]],
    ):
        result = command(*words)
        assert (result.code, result.err.count("\n")) == (2, 1) and message in result.err, result.err
        assert not Path("refused").exists()


def test_an_adapter_that_does_not_fit_is_refused(place: Path, trained: Path, tmp_path: Path, command: Command) -> None:
    lines = (tmp_path / "text.gguf").write_text("no adapter\n") and tmp_path / "text.gguf"
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes((trained / "adapter.gguf").read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2"))
    cases = [
        ("base.gguf", "q8.gguf", "is no LoRA adapter, but a model"),
        ("base.gguf", lines, "is no GGUF file"),
        ("base.gguf", "nowhere.gguf", "there is no such file"),
        ("base.gguf", "run", "give the file adapter.gguf in it"),
        ("q8.gguf", "run/adapter.gguf", "was trained on another base"),
        ("base.gguf", foreign, "is an adapter of a qwen2"),
        ("checkpoint", "run/adapter.gguf", "--adapter is an adapter of a GGUF file"),
        ("run", "run/adapter.gguf", "--adapter is an adapter of a GGUF file"),
    ]
    for model, adapter, message in cases:
        result = command("eval", "--model_name_or_path", model, "--adapter", adapter, *TASK[:4])
        assert (result.code, result.err.count("\n")) == (2, 1) and message in result.err, (model, adapter, result.err)


def test_commands_without_a_use_for_the_file_say_so(trained: Path, tmp_path: Path, command: Command) -> None:
    cases = [
        (
            ["estimate", "--model_name_or_path", "base.gguf", "--sequence_length", "16"],
            "the memory of training in llama.cpp is not predicted",
        ),
        (["replay", "q8.gguf", "run", "--output_dir", tmp_path / "x"], "is not the one the journal starts from"),
        (["replay", "base.gguf", "run", "--merge", "--output_dir", tmp_path / "x"], "leave --merge out"),
        (["replay", "base.gguf", "run", "--offload", "disk", "--output_dir", tmp_path / "x"], "leave --offload out"),
        (["convert", "base.gguf", tmp_path / "x"], "is no folder"),
        (["train", "--model_name_or_path", "checkpoint", *TASK, "--n_ctx", "64", "--output_dir", tmp_path / "x"], "option of GGUF files"),
    ]
    for words, message in cases:
        result = command(*words)
        assert (result.code, result.err.count("\n")) == (2, 1) and message in result.err, result.err
    assert not (tmp_path / "x").exists()


def test_a_run_whose_file_is_gone_says_what_to_give(trained: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(trained, tmp_path / "run")
    source = tmp_path / "run/zotune_gguf.json"
    source.write_text(source.read_text().replace("base.gguf", "gone.gguf"))
    result = command("eval", "--model_name_or_path", tmp_path / "run")
    assert result.code == 2 and "is gone: give the GGUF file, and" in result.err
    source.write_text("[]")
    result = command("eval", "--model_name_or_path", tmp_path / "run")
    assert result.code == 2 and "is damaged: it names no GGUF file" in result.err


def test_without_llama_cpp_it_says_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama_cpp", "llama_cpp.llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    result = command("train", *RUN, "--output_dir", "refused")
    assert (result.code, result.err.count("\n")) == (2, 1) and 'pip install "zotune[gguf]"' in result.err and not Path("refused").exists()
