"""An offloaded model trains as one in memory does, bit for bit, whatever its architecture and wherever its weights are meanwhile."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import toys
from zotune import ZerothOrder, checkpoint
from zotune.journal import digest
from zotune.offloading import blocks, load, offload, stream_of

NAMES = ("llama", "qwen2", "qwen3", "mistral", "opt", "gpt2", "bert")


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    """Matrices of the tiny models are worth moving."""
    monkeypatch.setattr(blocks, "SMALL", 64)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return toys.transformer(name, dtype, **({"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}))


def train(model: nn.Module, method: str, steps: int = 6, journal=None, **options) -> tuple[list[float], ZerothOrder]:
    optimizer = ZerothOrder(model, toys.method(method, interval=3, **options), lr=1e-3, seed=3, journal=journal)
    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(toys.transformer_loss(model), toys.tokens())))
        losses += optimizer.last.coefficients.tolist()
    return losses, optimizer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_architectures_stream_from_their_files_unmodified(name, tmp_path):
    """Losses, coefficients and trained weights of LOZO, folds included, from the shards of save_pretrained."""
    model_of(name, torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    plain = kind.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    streamed = load(tmp_path / "model", kind, dtype=torch.bfloat16)
    stream = stream_of(streamed)
    assert len(stream.parts) == 4
    assert digest(streamed) == digest(plain)
    expected, _ = train(plain, "lozo")
    found, _ = train(streamed, "lozo")
    assert found == expected
    assert_equal(weights(streamed), weights(plain))
    assert stream.traffic.written > 0


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize(("method", "dtype"), [("mezo", torch.bfloat16), ("lozo-m", torch.float16), ("mezo", torch.float32)])
def test_a_step_writes_what_it_would_have_written(to, method, dtype):
    """In full space every step's update waits for its block; none is left out when the weights are looked at."""
    plain, moved = model_of("llama", dtype), model_of("llama", dtype)
    offload(moved, to, resident=1)
    expected, _ = train(plain, method)
    found, _ = train(moved, method)
    assert found == expected
    assert_equal(weights(moved), weights(plain))


@pytest.mark.parametrize("method", ["lozo", "mezo"])
def test_a_checkpoint_continues_an_offloaded_run_exactly(method, tmp_path):
    """Saved between two folds, block by block, loaded into another stream; the end is that of the run in memory."""
    plain = model_of("llama", torch.bfloat16)
    expected, _ = train(plain, method, steps=8)
    first = model_of("llama", torch.bfloat16)
    offload(first, "disk")
    found, optimizer = train(first, method, steps=5)
    checkpoint.save_model(tmp_path, first)
    checkpoint.save_optimizer(tmp_path, optimizer)
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_equal(weights(second), weights(first))
    third = model_of("llama", torch.bfloat16)
    offload(third, "disk")
    missing, unexpected = third.load_state_dict(weights(second))
    assert not missing and not unexpected
    resumed = ZerothOrder(third, toys.method(method, interval=3), lr=1e-3, seed=3)
    checkpoint.load_optimizer(tmp_path, resumed)
    for _ in range(3):
        found.append(float(resumed.step(toys.transformer_loss(third), toys.tokens())))
        found += resumed.last.coefficients.tolist()
    assert found == expected
    assert_equal(weights(third), weights(plain))
