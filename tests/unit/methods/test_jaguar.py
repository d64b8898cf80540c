"""Chosen coordinates, and the rules that remember what they saw of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zotune import ZerothOrder, methods
from zotune.methods.rules import orthogonalized, resolve
from zotune.rng import sparse_directions
from zotune.rng.directions import Key
from zotune.rng.sparse_directions import Chosen

SHAPES = {"w": (6, 8), "v": (5,), "t": (4, 2, 3)}
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "numbers"), [("coordinate", {1}), ("row", {8}), ("block:2x3", {1, 2, 3, 4, 6})])
def test_so_many_coordinates_are_chosen_with_one_sign(kind, numbers):
    directions = sparse_directions.directions(kind, SHAPES)
    for step in range(20):
        z = directions.draw(Key(0, step, 0, "w"), (6, 8))
        assert int(z.count_nonzero()) in numbers
        assert z.unique().numel() == 2 and float(z.abs().max()) == 1.0
        rows, columns = z.nonzero(as_tuple=True)
        assert bool(z[rows.unique()][:, columns.unique()].all())  # a block has no holes


@pytest.mark.parametrize("kind", ["coordinate", "row", "block:2x3"])
def test_every_way_of_drawing_gives_the_same_numbers(kind):
    directions = Chosen(kind, SHAPES)
    key = Key(3, 4, 0, "w")
    whole = directions.draw(key, (6, 8))
    assert torch.equal(torch.cat([directions.block(key, slice(a, a + 16), CPU, 2.0) for a in (0, 16, 32)]).view(6, 8), 2 * whole)
    rows = torch.tensor([5, 0, 3])
    assert torch.equal(directions.rows(key, rows, 8), whole[rows])
    many = directions.draw_many(key, 3, (6, 8))
    assert torch.equal(many[0], whole) and torch.equal(many[2], directions.draw(key._replace(direction=2), (6, 8)))
    together = directions.draw_together(key, 2, ["w", "v"], [48, 5], CPU)
    assert torch.equal(together[:, :48], many[:2].view(2, -1))
    assert torch.equal(directions.combine([(key, 0.5)], (6, 8)), 0.5 * whole)


@pytest.mark.parametrize("name", SHAPES)
def test_coordinates_are_chosen_equally_often_and_signs_balance(name):
    shape = SHAPES[name]
    directions, steps = Chosen("coordinate", SHAPES), 4000
    z = torch.stack([directions.draw(Key(0, step, 0, name), shape).flatten() for step in range(steps)])
    share = 1 / z.shape[1]
    error = (share * (1 - share) / steps) ** 0.5
    assert bool(((z.abs().mean(dim=0) - share).abs() < 5 * error).all())
    assert bool((z.mean(dim=0).abs() < 5 * (share / steps) ** 0.5).all())


def follow(rule: str, estimates: list[torch.Tensor], **options) -> torch.Tensor:
    p = nn.Parameter(torch.zeros_like(estimates[0]))
    optimizer = resolve(rule)([p], lr=0.5, **options)
    for estimate in estimates:
        p.grad = estimate
        optimizer.step()
    return p.detach()


def test_jaguar_sign_renews_the_chosen_and_steps_by_all_known():
    first, second = torch.zeros(3, 2), torch.zeros(3, 2)
    first[0], second[0, 0], second[2] = 2.0, -1.0, 4.0
    after = follow("JaguarSign", [first, second], beta=0.25)
    # m after the first step: 1.5 in row 0; after the second: 0.25 · 1.5 − 0.75 = −0.375 at (0, 0), 1.5 at (0, 1), 3 in row 2
    assert torch.equal(after, -0.5 * torch.tensor([[1.0 - 1.0, 1.0 + 1.0], [0.0, 0.0], [1.0, 1.0]]))


def test_persistent_signs_keep_a_byte_and_forget_sizes():
    first, second = torch.zeros(3, 2), torch.zeros(3, 2)
    first[0], second[0], second[1] = 2.0, -1e-3, 5.0
    assert torch.equal(follow("PersistentSign", [first, second]), -0.5 * torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))


def test_jaguar_muon_orthogonalizes_matrices_and_signs_vectors():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(5, 3, generator=generator)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert torch.allclose(follow("JaguarMuon", [g], beta=0.0), -0.5 * orthogonalized(g))
    assert float((orthogonalized(g) - u @ v).abs().max()) < 0.3  # singular values between about 0.7 and 1.2
    assert torch.equal(follow("JaguarMuon", [g[:, 0]], beta=0.0), -0.5 * g[:, 0].sign())


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_orthogonalized_keeps_singular_vectors_values_near_one(shape):
    m = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    values = u.T @ orthogonalized(m) @ v.T
    assert torch.allclose(values, torch.diag(values.diagonal()), atol=1e-4)
    assert bool(((values.diagonal() > 0.6) & (values.diagonal() < 1.3)).all())
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("choice", ["coordinate", "row", "block:3x2"])
def test_a_step_shifts_the_chosen_and_remembers_the_derivative(choice):
    """On a linear loss δ is exactly the sum of the slopes over what was chosen."""
    model = nn.Linear(4, 3, bias=False)
    slopes = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    optimizer = ZerothOrder(model, methods.jaguar_sign(choice=choice, momentum=0.0, eps=1e-1), lr=1e-3)
    memory = torch.zeros(3, 4)
    for step in range(6):
        before = model.weight.detach().clone()
        optimizer.step(lambda x: (model(x).T * slopes).sum(), torch.eye(4))
        z = sparse_directions.directions(choice, {"weight": (3, 4)}).draw(Key(0, step, 0, "weight"), (3, 4))
        memory = torch.where(z != 0, (slopes * z.abs()).sum(), memory)
        assert torch.allclose(optimizer.rule.state()[0]["weight/exp_avg"], memory, atol=1e-4)
        assert torch.allclose(model.weight - before, -1e-3 * memory.sign(), atol=1e-6)
