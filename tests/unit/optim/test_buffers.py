"""Evaluations leave buffers as they are: batch statistics, power iterations, and whatever a module writes in evaluation mode."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

import toys
import zotune
from zotune.weights import external_linear


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def network(norm=parametrizations.spectral_norm) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        model(torch.randn(8, 6))  # statistics that are not those of the start
    return model.train()


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, hooked_spectral_norm])
@pytest.mark.parametrize("method", ["mezo", "lozo-e", "agzo", "zo-sgd-cons", "mezo-svrg", "forward-grad"])
def test_statistics_and_power_iterations_stay(norm, method: str, tmp_path) -> None:
    """In training mode too: a step evaluates in evaluation mode."""
    model, inputs = network(norm), torch.linspace(-1, 1, 48).view(8, 6)
    before = buffers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = zotune.ZerothOrder(model, method, lr=1e-2, journal=tmp_path / "journal.zo")
        assert same(before, buffers(model)), "the constructor"
        for _ in range(3):
            optimizer.step(lambda x: (model(x).squeeze(1) - x[:, 0]).square(), inputs)
        optimizer.state_dict(), optimizer.remove_hooks()
    assert same(before, buffers(model)) and all(module.training for module in model.modules())


def test_a_search_for_quantized_layers_computes_no_weight() -> None:
    model = network()
    before = buffers(model)
    assert not external_linear.external_layers(model) and same(before, buffers(model))


class Counting(nn.Module):
    """Counts its calls and averages its inputs, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0).detach()
        self.cache = x.detach()
        return (x - self.mean) * self.weight


@pytest.mark.parametrize("method", toys.names())
def test_what_a_forward_writes_in_evaluation_mode_is_put_back(method: str) -> None:
    model = nn.Sequential(Counting(), nn.Linear(6, 1))
    model(torch.ones(4, 6))
    before = {name: value for name, value in buffers(model).items() if "cache" not in name}
    inputs = torch.linspace(-1, 1, 48).view(8, 6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = zotune.ZerothOrder(model, method, lr=1e-2)
        for _ in range(2):
            optimizer.step(lambda x: (model(x).squeeze(1) - x[:, 0]).square(), inputs)
        optimizer.remove_hooks()
    assert same(before, {name: value for name, value in buffers(model).items() if "cache" not in name})
    told = [str(warning.message) for warning in said if "buffer" in str(warning.message)]
    assert len(told) == 1 and "0.calls, 0.mean" in told[0], told
