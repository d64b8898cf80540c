"""Parameters of unusual shape: no element, a single number."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import toys
import zotune


def without_inputs(outputs: int) -> nn.Linear:
    """A Linear layer whose weight has no element."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says so too
        return nn.Linear(0, outputs, bias=False)


class Odd(nn.Module):
    """A network with a Linear layer without inputs, and a trainable scalar."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)
        self.empty = without_inputs(8)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) * self.scale + self.empty(x[:, :0]))).squeeze(1)


def trained(method: str, folder: Path, **options: object) -> Odd:
    """The model after two steps, which replay."""
    model, inputs = Odd(), torch.linspace(-1, 1, 48).view(8, 6)
    optimizer = zotune.ZerothOrder(model, method, lr=1e-2, journal=folder / f"{method}.zo", **options)
    for _ in range(2):
        optimizer.step(lambda x: (model(x) - x[:, 0]).square(), inputs)
    optimizer.remove_hooks()
    optimizer.journal.close()
    other = zotune.replay(Odd(), folder / f"{method}.zo")
    other.remove_hooks()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.model.parameters(), strict=True))
    return model


@pytest.mark.parametrize("method", toys.names())
def test_a_parameter_without_elements_or_a_scalar_trains(method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a method may say that it learns slowly
        trained(method, tmp_path)


def test_a_scalar_is_batched_and_moves(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no batched evaluation")
        for method in ("lozo-e", "lozo-g", "mezo"):
            assert trained(method, tmp_path, forward_batching="auto").scale.item() != 1.0, method


def test_a_model_of_empty_parameters_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        zotune.ZerothOrder(without_inputs(4), "mezo", lr=1e-2)
