"""Weights perturbed a part at a time are those perturbed whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zotune.forward import lazy_weight
from zotune.forward.lazy_weight import LazyWeight
from zotune.forward.model import PerturbedForward
from zotune.rng.directions import Directions
from zotune.subspaces import Full, FullCoordinate, LowRank, LowRankCoordinate
from zotune.subspaces.coordinate import Offset

OFFSET = Offset(1e-2, seed=3, step=5, direction=1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def probe_of(model: nn.Module, kind: str = "gaussian") -> PerturbedForward:
    return PerturbedForward(model, [Full().coordinate(name, p) for name, p in model.named_parameters()], Directions(kind))


def embedding(rows: int, columns: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.Embedding:
    module = nn.Embedding(rows, columns, **options)
    module.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return module.eval()


def ids(rows: int) -> torch.Tensor:
    return torch.randint(0, rows, (4, 50), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", Directions.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [96, 131])
def test_rows_looked_up_are_those_of_the_whole_table(kind, dtype, columns):
    model = embedding(3000, columns, dtype)
    forward = probe_of(model, kind)
    found = forward.evaluate(lambda: model(ids(3000)), OFFSET)
    whole = forward.coordinates[0].at(forward.directions, OFFSET)
    assert found.dtype == dtype and torch.equal(found, whole[ids(3000)])
    assert not torch.equal(found, model.weight[ids(3000)])


def test_a_lookup_of_few_rows_makes_no_other_row(monkeypatch):
    model = embedding(3000, 96)
    forward = probe_of(model)
    monkeypatch.setattr(FullCoordinate, "at", lambda *unused: pytest.fail("the whole table was materialized"))
    forward.evaluate(lambda: model(ids(3000)), OFFSET)


@pytest.mark.parametrize("rows, options", [(150, {}), (3000, {"max_norm": 1.0}), (3000, {"padding_idx": 0})])
def test_other_lookups_agree_with_the_whole_table(rows, options):
    model = embedding(rows, 96, **options)
    forward = probe_of(model)
    before = model.weight.detach().clone()
    found = forward.evaluate(lambda: model(ids(rows)), OFFSET)
    whole = forward.coordinates[0].at(forward.directions, OFFSET)
    assert torch.equal(found, F.embedding(ids(rows), whole.clone(), max_norm=model.max_norm))
    assert torch.equal(model.weight, before)


class ReachingHead(nn.Module):
    """A head that uses the embedding's weight without owning it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = embedding(1000, 96)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        weight = self.embed.weight
        assert weight.shape == (1000, 96) and weight.dtype == torch.float32 and weight.device.type == "cpu"
        return F.linear(x, weight) + x @ weight.T + torch.stack([weight, weight]).sum()


def test_whoever_reaches_in_sees_the_whole_perturbed_weight():
    model = ReachingHead()
    forward = probe_of(model)
    found = forward.evaluate(lambda: model(ids(1000)), OFFSET)
    whole = forward.coordinates[0].at(forward.directions, OFFSET)
    x = whole[ids(1000)]
    assert torch.equal(found, F.linear(x, whole) + x @ whole.T + torch.stack([whole, whole]).sum())
    assert type(found) is torch.Tensor


def test_a_lookup_is_lent_to_large_embeddings_in_full_space_only():
    model = nn.Sequential(embedding(1000, 96), embedding(1000, 8))
    forward = probe_of(model)
    with torch.no_grad(), forward.at(OFFSET):
        assert isinstance(model[0].weight, LazyWeight)
        assert not isinstance(model[1].weight, LazyWeight)  # thin: its directions are kept anyway
    assert not isinstance(model[0].weight, LazyWeight)


@pytest.fixture
def small_strips(monkeypatch):
    monkeypatch.setattr(lazy_weight, "LARGE", 1000)
    monkeypatch.setattr(lazy_weight, "STRIP", 700)


@pytest.mark.parametrize("kind", Directions.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_strips_agrees_with_the_whole(kind, dtype, bias, small_strips):
    model = nn.Linear(100, 333, bias=bias, dtype=dtype).eval()
    x = torch.randn(2, 5, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    forward = probe_of(model, kind)
    far = Offset(1.0, seed=3, step=5, direction=1)
    found = forward.evaluate(lambda: model(x), far)
    weight, *rest = [c.at(forward.directions, far) for c in forward.coordinates]
    expected = F.linear(x, weight, *rest)
    assert found.dtype == dtype and found.shape == expected.shape
    assert torch.allclose(
        found.double(),
        expected.double(),
        rtol=4 * torch.finfo(dtype).eps,
        atol=(40 if dtype.itemsize == 2 else 400) * torch.finfo(dtype).eps,
    )
    with torch.no_grad():
        assert not torch.allclose(found, model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", Directions.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_are_the_rows_of_the_whole_weight(kind, dtype):
    weight = nn.Parameter(torch.randn(3000, 131, generator=torch.Generator().manual_seed(0)).to(dtype))
    coordinate, directions = Full().coordinate("w", weight), Directions(kind)
    whole = coordinate.at(directions, OFFSET)
    strips = [(rows, strip.clone()) for rows, strip in coordinate.strips_at(directions, OFFSET, 1700)]
    assert [rows for rows, _ in strips] == [slice(0, 1700), slice(1700, 3000)]
    assert torch.equal(torch.cat([strip for _, strip in strips]), whole)


def test_a_large_layer_is_never_formed_whole(small_strips, monkeypatch):
    model = nn.Linear(100, 333, bias=False).eval()
    forward = probe_of(model)
    monkeypatch.setattr(FullCoordinate, "at", lambda *unused: pytest.fail("the whole weight was materialized"))
    forward.evaluate(lambda: model(torch.ones(1, 100)), OFFSET)


@pytest.mark.parametrize("kind", Directions.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_layers_that_share_a_room_see_their_own_weights(kind, dtype, monkeypatch):
    monkeypatch.setattr(lazy_weight, "SMALL", 6000)
    monkeypatch.setattr(lazy_weight, "PART", 1)
    model = nn.Sequential(nn.Linear(90, 100), nn.Linear(100, 80), nn.Linear(80, 100, bias=False), nn.Linear(100, 90)).to(dtype).eval()
    x = torch.randn(2, 5, 90, generator=torch.Generator().manual_seed(2)).to(dtype)
    forward = probe_of(model, kind)
    stored = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad(), forward.at(OFFSET):
        weights = [layer.weight for layer in model]
        assert all(isinstance(weight, LazyWeight) for weight in weights)
        kept = model[0](x)
        buffers = {weight.buffer.flat.data_ptr() for weight in weights}
        before = kept.clone()
        found = model(x)
        assert len(buffers) == 1 and torch.equal(kept, before)
    expected = x
    for layer in model:
        perturbed = [c.at(forward.directions, OFFSET) for p in layer.parameters() for c in forward.coordinates if c.parameter is p]
        expected = F.linear(expected, *perturbed)
    assert torch.equal(found, expected)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), stored, strict=True))


# -- low rank: the general path, to which hooks are compared ------------------------------------------------------------------------------


@pytest.fixture
def short_strips(monkeypatch):
    monkeypatch.setattr(lazy_weight, "LOW_RANK_STRIP", (1700, 1700))


class Tied(nn.Module):
    """A table that is the head too, as in language models."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = embedding(3000, 96, dtype)
        self.head = nn.Linear(96, 3000, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def low_rank_probe(model: nn.Module) -> PerturbedForward:
    low_rank = LowRank(rank=3, interval=5)
    forward = PerturbedForward(model, [low_rank.coordinate(name, p) for name, p in model.named_parameters()], Directions("gaussian"))
    for coordinate in forward.coordinates:
        coordinate.begin_step(3, 5)
        coordinate.descend(forward.directions, [0.1], 1.0, 3, 5)  # something is pending
    return forward


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_weights_are_used_a_part_at_a_time(dtype, short_strips, monkeypatch):
    model, far = Tied(dtype).eval(), Offset(1.0, seed=3, step=5, direction=1)
    forward = low_rank_probe(model)
    whole, bias = (coordinate.at(forward.directions, far) for coordinate in forward.coordinates)
    expected = F.linear(F.embedding(ids(3000), whole), whole, bias)
    monkeypatch.setattr(LowRankCoordinate, "at", lambda *unused: pytest.fail("the whole weight was materialized"))
    with torch.no_grad(), forward.at(far, hooks=False):
        assert isinstance(model.head.weight, LazyWeight) and isinstance(model.embed.weight, LazyWeight)
        found = model(ids(3000))
    size = float(expected.double().abs().max())
    assert found.dtype == dtype and torch.allclose(found.double(), expected.double(), rtol=0, atol=40 * torch.finfo(dtype).eps * size)
    with torch.no_grad():
        assert not torch.allclose(found, model(ids(3000)), rtol=0.1, atol=0.1)


def test_a_low_rank_weight_that_somebody_reaches_into_is_whole():
    model = ReachingHead()
    forward = low_rank_probe(model)
    whole = forward.coordinates[0].at(forward.directions, OFFSET)
    x = whole[ids(1000)]
    with torch.no_grad(), forward.at(OFFSET, hooks=False):
        found = model(ids(1000))
    assert torch.allclose(found, F.linear(x, whole) + x @ whole.T + torch.stack([whole, whole]).sum(), atol=1e-3)
