"""LoRA on an encoder whose files lack more than the head: the saved adapter is the model that was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertForMaskedLM, BertForMaskedLM, DebertaForMaskedLM, RobertaForMaskedLM

from command_cases import Result, run_command, save_data, save_encoder
from zotune.tasks.model_kind import ModelKind
from zotune.training.adapters import base_name
from zotune.training.arguments import ModelArguments
from zotune.training.loading import load_model, plan_model
from zotune.training.run_record import RunRecord

pytest.importorskip("peft")

ENCODERS: dict[str, tuple[type, dict[str, Any], str]] = {
    "bert": (BertForMaskedLM, {}, "bert.pooler.dense"),
    "deberta": (DebertaForMaskedLM, {}, "pooler.dense"),
    "albert": (AlbertForMaskedLM, {"embedding_size": 8}, "albert.pooler"),
    "roberta": (RobertaForMaskedLM, {"pad_token_id": 1}, ""),
}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *words: run_command(capsys, *words)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[3, 5, 7, 9]])).logits


def loaded(folder: Path, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    arguments = ModelArguments(str(folder))
    model, _ = load_model(
        plan_model(arguments, "zotune eval"), arguments, torch.device("cpu"), kind=ModelKind("classifier", ("terrible", "great"))
    )
    return model


@pytest.mark.filterwarnings("ignore:no batched evaluation")
@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_adapter_is_the_trained_model(name: str, tmp_path: Path, command: Callable[..., Result], monkeypatch: Any) -> None:
    kind, options, pooler = ENCODERS[name]
    save_encoder(tmp_path / "encoder", kind, **options)
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    trained = {}
    save = RunRecord.save_model
    monkeypatch.setattr(RunRecord, "save_model", lambda self: (trained.update(logits=logits(self.trainer.model)), save(self)))
    words = ["train", "--model_name_or_path", "encoder", "--task", "sst2", "--data_dir", "data", "--output_dir", "run", "--scheme", "lora"]
    words += [
        "--method",
        "mezo",
        "--learning_rate",
        "1e-2",
        "--max_steps",
        "3",
        "--save_steps",
        "2",
        "--num_eval",
        "4",
        "--max_length",
        "20",
    ]
    words += ["--lora_target_modules", "query_proj" if name == "deberta-v2" else "in_proj" if name == "deberta" else "query"]
    assert (result := command(*words)).code == 0, result.err
    first, second = (logits(loaded(tmp_path / "run", seed)) for seed in (1, 2))
    assert torch.equal(first, second) and torch.equal(first, trained["logits"])
    assert any(base_name(key).startswith(pooler) for key in load_file("run/adapter_model.safetensors")) or not pooler

    assert (result := command("replay", "encoder", "run", "--output_dir", "again", "--use_cpu")).code == 0, result.err
    assert torch.equal(logits(loaded(tmp_path / "again", 3)), trained["logits"])
    assert (result := command(*words, "--max_steps", "4", "--resume_from_checkpoint", "true")).code == 0, result.err


def test_an_adapter_that_lacks_a_fresh_layer_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_encoder(tmp_path / "encoder", BertForMaskedLM)
    get_peft_model(loaded(tmp_path / "encoder", 0), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match=r"does not hold bert\.pooler\.dense\.bias, which the base model's files lack too"):
        loaded(tmp_path / "a", 0)
    weights = load_file(tmp_path / "a/adapter_model.safetensors")
    save_file({key: value for key, value in weights.items() if "classifier" not in key}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        loaded(tmp_path / "a", 0)
