"""A base in 8 or 4 bits: what it computes, how a low-rank method moves it, and what it takes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import toys
from zotune import ZerothOrder, methods
from zotune.baselines import catalog
from zotune.optim.journal import Journal
from zotune.optim.replay import replay
from zotune.training.schemes import Scheme, refusal
from zotune.weights import quantized_linear
from zotune.weights.external_linear import pieces, wrap
from zotune.weights.quantized_linear import QuantizedLinear, dense_state, dequantize, quantize


def llama() -> nn.Module:
    return toys.transformer("llama", hidden_size=32, intermediate_size=64)


def dense_twin(model: nn.Module) -> nn.Module:
    """The model with ordinary layers of the weights that the few bits stand for."""
    twin = llama()
    twin.load_state_dict(dense_state(model), strict=False)
    return twin


def train(
    model: nn.Module, steps: int = 7, forward_batching: str = "batched", journal: Path | None = None
) -> tuple[list[float], ZerothOrder]:
    optimizer = ZerothOrder(model, methods.lozo(rank=2, interval=3), lr=1e-3, seed=1, forward_batching=forward_batching, journal=journal)
    found = []
    for _ in range(steps):
        optimizer.step(toys.transformer_loss(model), toys.tokens())
        found += optimizer.last_report.coefficients.tolist()
    return found, optimizer


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.5 / 127), (4, 0.5 / 7)])
def test_a_weight_is_the_nearest_that_can_be_had(bits, worst):
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    layer = QuantizedLinear(linear, bits)
    group = 64 if bits == 8 else 32
    largest = linear.weight.view(24, -1, group).abs().amax(dim=2, keepdim=True)
    error = (layer.dense() - linear.weight).view(24, -1, group).abs()
    assert bool((error <= worst * largest * 1.0001).all())
    x = torch.randn(3, 5, 64)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.dense(), linear.bias), atol=1e-5)
    assert layer.codes.numel() == 64 * 24 * bits // 8
    assert layer.weight.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("forward_batching", ["batched", "sequential"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_frozen_base_trains_as_its_dense_twin(bits, forward_batching):
    """Coefficients to 1e-3 of their size over two folds, and the weights that come of it, without one of the codes changed."""
    model = quantize(llama(), bits)
    twin = dense_twin(model)
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("codes")}
    expected, _ = train(twin, forward_batching=forward_batching)
    found, optimizer = train(model, forward_batching=forward_batching)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3 * max(map(abs, expected)))
    trained, dense = dense_state(model), twin.state_dict()
    assert trained.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.allclose(trained[name], tensor, rtol=1e-4, atol=1e-5), name
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers() if name in codes)
    assert model.model.layers[0].mlp.up_proj.left.shape[1] == 2 * 2
    optimizer.remove_hooks()
    assert model.model.layers[0].mlp.up_proj.left.shape[1] == 3 * 2


def test_a_journal_replays_and_a_state_continues(tmp_path):
    model, base = quantize(llama(), 8), quantize(llama(), 8)
    loss = toys.transformer_loss
    optimizer = ZerothOrder(model, methods.lozo(rank=2, interval=3), lr=1e-3, journal=tmp_path / "j")
    for _ in range(4):
        optimizer.step(loss(model), toys.tokens())
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(loss(model), toys.tokens())
    replay(base, Journal.open(tmp_path / "j"))
    later = quantize(llama(), 8)
    later.load_state_dict(weights)
    resumed = ZerothOrder(later, methods.lozo(rank=2, interval=3), lr=1e-3)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.step(loss(later), toys.tokens())
    for other in (base, later):
        found = other.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_full_space_is_refused():
    with pytest.raises(ValueError, match="is quantized, so it is trained by low-rank factors only"):
        ZerothOrder(quantize(llama(), 8), "mezo", lr=1e-3)
    with pytest.raises(ValueError, match="multiples of 32"):
        quantize(nn.Sequential(nn.Linear(20, 4)), 4)


@pytest.mark.parametrize("forward_batching", ["batched", "sequential"])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_on_a_base_in_few_bits(bits, forward_batching):
    """Its coefficients are those of the dense twin, in memory and streamed; merged it is the twin's merged model."""
    peft = pytest.importorskip("peft")
    from zotune.weights.offload import offload

    def trained(model: nn.Module) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        optimizer = ZerothOrder(model, "mezo", lr=1e-2, seed=1, forward_batching=forward_batching)
        found = []
        for _ in range(3):
            optimizer.step(toys.transformer_loss(model), toys.tokens())
            found += optimizer.last_report.coefficients.tolist()
        return found, model

    base, away = quantize(llama(), bits), quantize(llama(), bits)
    codes = {name: buffer.clone() for name, buffer in base.named_buffers()}
    offload(away, "disk")
    expected, twin = trained(dense_twin(base))
    found, model = trained(base)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3 * max(map(abs, expected)))
    assert trained(away)[0] == found
    assert all(torch.equal(buffer, codes[name.replace(".base_layer", "")]) for name, buffer in base.named_buffers())
    merged, dense = dequantize(model).merge_and_unload().state_dict(), twin.merge_and_unload().state_dict()
    assert merged.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.allclose(merged[name], tensor, rtol=1e-4, atol=1e-5), name


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear:UserWarning")
def test_an_adapter_on_weights_that_torchao_holds():
    """Its batched step is that of the dequantized model; such weights stay in memory."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    peft = pytest.importorskip("peft")
    from zotune.weights.offload import offload

    def adapted(model: nn.Module) -> list[float]:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        optimizer = ZerothOrder(model, "mezo", lr=1e-3, seed=1)
        return [float(optimizer.step(toys.transformer_loss(model), toys.tokens())) for _ in range(3)]

    model, twin = llama(), llama()
    config = quantization.Int8WeightOnlyConfig(version=2)
    quantization.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                twin.get_parameter(name).copy_(parameter.dequantize())
    with pytest.raises(ValueError, match="no matrix of its own"):
        offload(model)
    assert adapted(model) == pytest.approx(adapted(twin), rel=1e-4)


def quantized(library: str) -> nn.Module:
    """A model whose Linear layers a library holds; "stand-in": a packed Linear of our own, in the way of bitsandbytes."""
    model = llama().requires_grad_(False)
    chosen = [(p, n, c) for p in model.modules() for n, c in p.named_children() if isinstance(c, nn.Linear) and n != "lm_head"]
    if library.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        kind = torch.int4 if library == "torchao int4" else torch.int8
        config = quantization.IntxWeightOnlyConfig(kind) if kind is torch.int4 else quantization.Int8WeightOnlyConfig(version=2)
        quantization.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
        return model
    for parent, name, child in chosen:
        if library == "stand-in":
            layer: nn.Module = Packed(child)
        else:
            bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
            shape = child.in_features, child.out_features, child.bias is not None
            if library == "bitsandbytes nf4":
                layer = bnb.nn.Linear4bit(*shape, quant_type="nf4", compute_dtype=torch.float32)
            else:
                layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            layer.load_state_dict(child.state_dict())
            layer.to("cpu")
        setattr(parent, name, layer)
    return model


class Packed(nn.Linear):
    """Bytes with a scale, as a Linear of another library may hold them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


#: Library, and how far coefficients may be from those of the dense twin, as a share of the largest: eight bits of bitsandbytes round inputs
#: as well.
HELD = [("stand-in", 1e-3), ("torchao int8", 1e-3), ("torchao int4", 1e-3), ("bitsandbytes nf4", 1e-3), ("bitsandbytes int8", 0.3)]


@pytest.mark.parametrize(("library", "tolerance"), HELD)
def test_low_rank_on_weights_that_another_library_holds(library, tolerance, tmp_path):
    """Factors beside a layer that is only called: coefficients and weights of the dense twin, nothing of the library's written."""
    model = quantized(library)
    with pytest.raises(ValueError, match="is quantized, so it is trained by low-rank factors only"):
        ZerothOrder(wrap(quantized(library)), "mezo", lr=1e-3)
    wrap(model)
    before = {name: tensor.clone() for name, tensor in pieces(model)}
    assert before
    twin = dense_twin(model)
    twin.requires_grad_(False)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("proj" in name)
    expected, _ = train(twin)
    found, optimizer = train(model, journal=tmp_path / "j")
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance * max(map(abs, expected)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in pieces(model))
    trained = dense_state(model)
    if tolerance < 0.01:
        for name, tensor in twin.state_dict().items():
            assert torch.allclose(trained[name], tensor, rtol=1e-4, atol=1e-5), name
    again = wrap(quantized(library))
    replay(again, tmp_path / "j")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in dense_state(again).items())
    loaded = wrap(quantized(library))
    loaded.load_state_dict(model.state_dict())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in dense_state(loaded).items())
    optimizer.remove_hooks()


def test_what_another_library_holds_is_not_trained_by_mistake():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(TwoTensor(torch.ones(64, 32), torch.ones(64, 32)))
    with pytest.raises(ValueError, match=r"up_proj.weight is quantized by another library.*wrap\(model\)"):
        ZerothOrder(model, "lozo", lr=1e-3)
    for method in ("lozo", "fo-sgd"):
        assert "--scheme lora" in (refusal(catalog.get(method), quantized("stand-in"), Scheme()) or "")
    with pytest.raises(ValueError, match="nothing to wrap"):
        wrap(llama())


class Largest(TorchDispatchMode):
    """How many floating-point numbers the largest tensor has that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.untyped_storage().nbytes() >= out.numel():
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("forward_batching", ["batched", "sequential"])
def test_a_step_never_makes_the_weight(monkeypatch, forward_batching):
    """Its largest tensor is that of an inference: a strip of the weight."""
    monkeypatch.setattr(quantized_linear, "STRIP", 1 << 12)
    model = quantize(nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 32)), 4)
    x = torch.randn(2, 256)
    with Largest() as inference, torch.no_grad():
        model(x)
    optimizer = ZerothOrder(model, methods.lozo(rank=2, interval=2), lr=1e-3, forward_batching=forward_batching)
    optimizer.step(lambda rows: model(rows).square().mean(dim=1), x)  # the first compares ways to evaluate
    with Largest() as step:
        for _ in range(4):
            optimizer.step(lambda rows: model(rows).square().mean(dim=1), x)
    assert inference.numel == step.numel == 1 << 12
