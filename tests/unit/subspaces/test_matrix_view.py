"""Weights of any shape as matrices: experts have factors of their own, kernels are matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zotune.rng.directions import Directions
from zotune.subspaces import Activation, Full, Guided, Left, LowRank, RankOnes, TwoSided
from zotune.subspaces.coordinate import Offset, is_thin
from zotune.subspaces.matrix_view import matrix_view

SUBSPACES = {
    "low rank": LowRank(2, 5),
    "two-sided": TwoSided(2, 5),
    "left fixed": Left(2, 5),
    "rank ones": RankOnes(3),
    "guided": Guided(2, 5),
    "activation": Activation(2, 5),
}
EXPERTS, NESTED, KERNEL, TALL = (4, 96, 32), (2, 3, 40, 20), (40, 6, 3, 3), (2, 9000, 17)
DIRECTIONS = Directions("gaussian")
every_subspace = pytest.mark.parametrize("kind", SUBSPACES)


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((), None),
        ((7,), None),
        ((1, 7), None),
        ((5, 7), (1, 5, 7)),
        ((1, 5, 7), (1, 5, 7)),
        (EXPERTS, (4, 96, 32)),
        (NESTED, (6, 40, 20)),
        (KERNEL, (1, 40, 54)),
        ((64, 1, 4), (1, 64, 4)),
    ],
)
def test_every_shape_is_matrices_or_a_vector(shape, view):
    assert matrix_view(shape) == view


def test_thin_is_said_of_the_matrices():
    assert is_thin(()) and is_thin((64, 1, 4)) and is_thin((8, 100, 64))
    assert not is_thin((8, 100, 65)) and not is_thin((512, 512, 3))
    assert Full().coordinate("w", parameter((80, 1, 4))).thin


@every_subspace
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [EXPERTS, NESTED, KERNEL, TALL], ids=str)
def test_the_weight_is_w_plus_the_product_of_each_matrix(kind, dtype, shape):
    weight = parameter(shape, dtype)
    before, coordinate = weight.detach().clone(), SUBSPACES[kind].coordinate("w", weight)
    coordinate.fold_every_step()
    coordinate.begin_step(0, 0)
    offset = Offset(0.1, 0, 0, 0)
    left, right = coordinate.factors(coordinate.core_at(DIRECTIONS, offset))
    product = (left @ right.mT).reshape(shape)
    found, rounding = coordinate.at(DIRECTIONS, offset), 1e-5 if dtype == torch.float32 else 8e-3
    assert found.dtype == dtype and torch.equal(weight, before)
    assert torch.allclose(found.float(), before.float() + product, rtol=rounding, atol=1e-5)
    coordinate.descend(DIRECTIONS, [0.1], 0.9, 0, 0)
    assert torch.allclose(weight.float(), 0.9 * before.float() + product, rtol=2 * rounding, atol=1e-5)


@every_subspace
@pytest.mark.parametrize("shape", [EXPERTS, NESTED, KERNEL], ids=str)
def test_elements_are_counted_as_they_are_kept(kind, shape):
    coordinate = SUBSPACES[kind].coordinate("w", parameter(shape))
    kept = sum(tensor.numel() for tensor in coordinate.kept() if tensor.dtype == torch.float32)
    assert SUBSPACES[kind].elements(shape) == (coordinate.numel, kept)


@every_subspace
def test_experts_have_factors_of_their_own(kind):
    """Each of another V, and moments are carried to the next V expert by expert."""
    coordinate = SUBSPACES[kind].coordinate("w", parameter(EXPERTS))
    coordinate.begin_step(0, 0)
    products = [left @ right.T for left, right in zip(*coordinate.factors(torch.ones(coordinate.shape)), strict=True)]
    assert not any(torch.allclose(one, products[0]) for one in products[1:])
    carry = coordinate.begin_step(0, 5)
    if carry is not None:
        moment = torch.randn(coordinate.shape)
        only = torch.zeros_like(moment)
        only[1] = moment[1]
        assert torch.allclose(carry(only)[1], carry(moment)[1]) and not carry(only)[0].any()


def test_an_estimate_in_factors_is_unbiased_for_each_expert():
    """Over many V, the mean of (G V) Vᵀ / r is G."""
    weight, gradient = parameter((3, 20, 24)), torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(1))
    total, draws = torch.zeros_like(gradient), 3000
    coordinate = LowRank(2, 1).coordinate("w", weight)
    for step in range(draws):
        coordinate.begin_step(0, step)
        total += coordinate.lr_scale * (gradient @ coordinate.v) @ coordinate.v.mT / draws
    error = (total - gradient).norm() / gradient.norm()
    assert error < 1.2 * ((24 + 1) / (2 * draws)) ** 0.5
