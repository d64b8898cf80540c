"""docs/reference/coming_from.md: every name of its tables is one of this library, or of the other one where that is installed."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import zotune
from command_cases import run_command
from docs_pages import DOCS
from trainer_cases import tiny_llama

peft = pytest.importorskip("peft")
PAGE = (DOCS / "reference/coming_from.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])


def cells(section: str, column: int) -> list[str]:
    """The names in one column of a section's table, as they are written."""
    rows = [line.split("|") for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[1 + column])]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_option_of_this_side_exists(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"train": "--help-all", "export": "--help", "report": "--help"}
    known = {name: set(re.findall(r"--\w+", run_command(capsys, name, flag).out)) for name, flag in shown.items()}
    for text in cells(section, 1) + [name for name in cells(section, 2) if name.startswith(("--", "zotune "))]:
        command = text.split()[1] if text.startswith("zotune ") else "train"
        if command in known:
            assert set(re.findall(r"--\w+", text)) <= known[command] | {"--config"}, text


def test_every_name_of_transformers_exists() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    names = cells("Hugging Face Trainer", 0)
    assert set(names) <= fields and len(names) > 20


def test_every_name_of_peft_exists() -> None:
    fields = {field.name for cls in (peft.LoraConfig, peft.PromptTuningConfig) for field in dataclasses.fields(cls)}
    for name in cells("PEFT", 0):
        assert name in fields or hasattr(peft, name) or hasattr(peft.PeftModel, name) or hasattr(peft.LoraModel, name), name


def test_every_name_of_trl_exists() -> None:
    trl = pytest.importorskip("trl")
    known = {"peft_config", "reward_funcs"}  # of the trainers
    for cls in (trl.SFTConfig, trl.GRPOConfig, trl.ModelConfig, trl.ScriptArguments):
        known |= {field.name for field in dataclasses.fields(cls)}
    names = {name.removeprefix("--") for name in cells("TRL", 0) if not name.startswith("trl ")}
    assert names - known == {"config"} and len(names) > 30


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=["dora", "ia3", "adalora", "vera"],
)
@pytest.mark.filterwarnings("ignore:.*cannot be evaluated with several weights")
def test_any_adapter_of_peft_is_trained_alone(config: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_llama(), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(24).view(4, 6)
    optimizer = zotune.ZerothOrder(model, zotune.methods.mezo(eps=0.3), lr=1e-2)
    optimizer.step(lambda batch: -model(batch).logits.log_softmax(-1)[..., 0].mean(1), ids)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
