"""What a checkpoint does not hold, the base's frozen weights, must be that of the run when it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_cases import StopAt, tiny_llama, trainer
from zotune.training.checkpoint import storage
from zotune.training.schemes import apply
from zotune.weights.quantized_linear import quantize

RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def over(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    base = tiny_llama(seed=seed, dtype=dtype)
    return quantize(base, 8) if kind == "int8" else base if kind == "full" else apply(base, kind)


@pytest.mark.filterwarnings("ignore:no batched evaluation")
@pytest.mark.parametrize(
    ("kind", "method"), [("lora", "mezo"), ("lora", "fo-adamw"), ("prefix", "mezo"), ("prompt", "mezo"), ("int8", "lozo"), ("int8", "qes")]
)
def test_another_base_cannot_continue_a_checkpoint(kind: str, method: str, tmp_path: Path) -> None:
    options = {**RUN, "method": method, **{"lozo": {"rank": 2}, "qes": {"num_directions": 2}}.get(method, {})}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, over(kind, 0), callbacks=[StopAt(3)], **options).train()
    for wanted in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match="began from another base model"):
            trainer(tmp_path, over(kind, 1), **options).train(resume_from_checkpoint=wanted)
    trainer(tmp_path, over(kind, 0), **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", ["lozo", "mezo", "fo-adamw"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_run_resumed_in_another_dtype_is_one_sentence(method: str, saved: bool, tmp_path: Path) -> None:
    if method == "fo-adamw" and not saved:
        pytest.skip("a first-order run has no journal")
    options = {**RUN, "method": method, **({} if saved else {"save_strategy": "no"})}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, over("full", 0), callbacks=[StopAt(3)], **options).train()
    with pytest.raises(ValueError, match=r"weights are float32, and those of this model bfloat16: load it in float32"):
        trainer(tmp_path, over("full", 0, torch.bfloat16), **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_says_what_it_does_not_hold(tmp_path: Path) -> None:
    trainer(tmp_path / "full", over("full", 0), **RUN).train()
    trainer(tmp_path / "lora", over("lora", 0), **{**RUN, "method": "mezo"}).train()
    full, lora = (json.loads((tmp_path / f"{name}/checkpoint-2" / storage.STATE).read_text())["weights"] for name in ("full", "lora"))
    assert full == {"dtypes": ["float32"], "frozen": None}
    assert lora["dtypes"] == ["float32"] and len(lora["frozen"]) == 32
