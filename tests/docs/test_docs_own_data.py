"""docs/how-to/data.md, followed from top to bottom in an empty folder, with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chat_tokenizers import chat_tokenizer
from command_cases import run_command
from docs_pages import DOCS, command_blocks, python_blocks, save_files

PAGE = DOCS / "how-to/data.md"


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_files(PAGE, tmp_path)
    _save_models()
    for source in python_blocks(PAGE):
        exec(compile(source, str(PAGE), "exec"), {})
    blocks = [block.commands for block in command_blocks(PAGE) if block.mark == "data"]
    assert [len(commands) for commands in blocks] == [2, 2, 1, 1, 1]
    for words in (words for commands in blocks for words in commands):
        assert words[0] == "zotune"
        result = run_command(capsys, *words[1:], *(["--max_steps", "2"] if words[1] == "train" else ["--output_file", "eval.json"]))
        assert result.code == 0, result.err
    assert Path("runs/tickets/task.yaml").is_file()
    assert json.loads(Path("eval.json").read_text())["metrics"].keys() >= {"accuracy", "f1"}
    metrics = {"tickets": "accuracy", "pairs": "loss", "joined": "loss", "calls": "loss", "book": "loss", "saved": "accuracy"}
    for run, name in metrics.items():
        summary = json.loads(Path(f"runs/{run}/summary.json").read_text())
        assert summary["metric"] == name and summary["steps"] == 2, run
    assert summary["after"]["accuracy"] in (0, 0.5, 1)
    assert AutoModelForCausalLM.from_pretrained("runs/tickets").config.vocab_size >= 256


def _save_models() -> None:
    """A random Llama, without a chat template and with one that writes tools."""
    tokenizer = chat_tokenizer("byte-level")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes))
    kept = tokenizer.chat_template
    try:
        for folder, template in (("my-chat-model", kept), ("my-model", None)):
            tokenizer.chat_template = template
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = kept
