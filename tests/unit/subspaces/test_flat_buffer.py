"""Small coordinates lie side by side, and nothing about one depends on the other members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import toys
from zotune import ZerothOrder, methods
from zotune.optim.update import update_groups
from zotune.rng.directions import Directions
from zotune.subspaces import Full, LowRank
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.flat_buffer import RUN, BatchedValues, FlatBuffer, build_flat_buffers
from zotune.weights.precision import HALF

SHAPES = {
    "bias": (30,),
    "adapter": (7, 3),
    "norm": (768,),
    "wide": (4, 2000),
    "long": (8000,),
    "longer": (8190,),
    "longest": (8192,),
    "last": (5,),
}


def coordinates(dtype: torch.dtype = torch.float32) -> list[Coordinate]:
    generator = torch.Generator().manual_seed(0)
    return [Full().coordinate(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for name, shape in SHAPES.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", Directions.KINDS)
def test_neighbors_descend_bit_for_bit_as_each_does_alone(dtype, kind):
    alone, beside = coordinates(dtype), coordinates(dtype)
    (buffer,) = build_flat_buffers(beside)
    directions = Directions(kind)
    for step, weights in enumerate([[1e-3], [1e-3, 0.0, -2e-4], [1e-4 * k for k in range(20)]]):
        buffer.descend(directions, weights, 0.999, 0, step)
        for coordinate in alone:
            coordinate.descend(directions, weights, 0.999, 0, step)
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a.parameter, b.parameter)
        assert dtype not in HALF or torch.equal(a.residual_tensor(), b.residual_tensor())


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_update_in_bounded_chunks_of_directions_is_the_same(monkeypatch, at_once):
    """One draws the direction that is asked for, not its group: 16 of them may be more than the forward itself takes."""
    free, bounded = coordinates(), coordinates()
    (unbounded,) = build_flat_buffers(free)
    (buffer,) = build_flat_buffers(bounded, drawn=(at_once + 1) * sum(c.numel for c in bounded) - 1)
    drawn, draw = [], Directions.draw_together

    def counted(self, key, count, *rest):
        drawn.append(count)
        return draw(self, key, count, *rest)

    directions = Directions("gaussian")
    unbounded.descend(directions, [1e-4 * k for k in range(20)], 1.0, 0, 0)
    monkeypatch.setattr(Directions, "draw_together", counted)
    buffer.draw(directions, 0, 0, 5, 1)
    buffer.descend(directions, [1e-4 * k for k in range(20)], 1.0, 0, 0)
    assert max(drawn) == at_once
    for a, b in zip(free, bounded, strict=True):
        assert torch.equal(a.parameter, b.parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_shown_is_theta_plus_each_offset(dtype):
    members = coordinates(dtype)
    (buffer,) = build_flat_buffers(members)
    assert len(buffer.runs) > BatchedValues.CACHED and all(run.stop - run.start <= RUN for run in buffer.runs)
    directions = Directions("gaussian")
    z = buffer.draw(directions, 0, 3, 0, 2)
    shown = BatchedValues(buffer, z, torch.tensor([[0.1, -0.1], [0.2, 0.0]]), dtype)
    for coordinate in [*members, *members]:  # runs that were let go of come again
        values = shown.of(coordinate.name).view(4, *coordinate.shape)
        for value, (scale, direction) in zip(values, [(0.1, 0), (-0.1, 0), (0.2, 1), (0.0, 1)], strict=True):
            expected = coordinate.at(directions, Offset(scale, 0, 3, direction))
            assert torch.allclose(value.float(), expected.float(), rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_estimates_of_neighbors_are_those_of_each_alone():
    alone, beside = coordinates(), coordinates()
    build_flat_buffers(beside)
    directions = Directions("gaussian")
    weights = [0.1 * k for k in range(20)]
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a.weighted(directions, weights, 0, 0), b.weighted(directions, weights, 0, 0))


def test_directions_are_forgotten_once_nobody_needs_them():
    members = coordinates()
    (buffer,) = build_flat_buffers(members)
    members[0].draw(Directions("gaussian"), 0, 0, 0, 2)
    for coordinate in members:
        assert buffer.drawn is not None and coordinate.drawn
        coordinate.drop()
        assert not coordinate.drawn
    assert buffer.drawn is None


def test_only_coordinates_of_one_kind_are_neighbors():
    model = toys.classifier()
    low = [LowRank(2, 50).coordinate(name, p) for name, p in model.named_parameters()]
    half = Full().coordinate("half", nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))
    large = Full().coordinate("large", nn.Parameter(torch.ones(100, 100)))
    found = build_flat_buffers([*low, half, large])
    assert sorted(len(n.members) for n in found) == [1, 3, 4]  # half; matrices at rate 1/2; vectors
    assert large.flat_buffer is None
    assert {type(one) for one in update_groups([*low, half])} == {FlatBuffer}
    apart = [one for one in update_groups([*low[1:], large]) if isinstance(one, Coordinate)]
    assert apart == [c for c in low[1:] if c.parameter.dim() == 2] + [large]  # without one of them, those of its kind move alone


class Projections(nn.Module):
    """Two layers of one parent, given the same tensor, one changed in between, or two tensors."""

    def __init__(self, given: str) -> None:
        super().__init__()
        self.embedding, self.one, self.two, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.given = given

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        first = self.one(x)
        if self.given == "changed":
            x.mul_(2)
        return self.out(first * self.two(x if self.given != "another" else x + 1))


@pytest.mark.parametrize("given", ["same", "changed", "another"])
@pytest.mark.parametrize("rank", [1, 2])
def test_siblings_share_an_input_only_while_it_is_the_same(given, rank):
    losses = []
    for forward_batching in ("batched", "sequential"):
        torch.manual_seed(0)
        model = Projections(given)
        optimizer = ZerothOrder(
            model, methods.lozo(directions_per="example", rank=rank, eps=1e-2), lr=1e-2, forward_batching=forward_batching
        )
        for _ in range(3):
            optimizer.step(toys.loss_function(model), toys.batch())
        assert optimizer.evaluator.batched == (forward_batching == "batched")
        losses.append(optimizer.last_report.coefficients)
    assert torch.allclose(*losses, atol=1e-3)
