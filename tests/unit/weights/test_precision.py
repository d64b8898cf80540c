"""Law 3: no update is lost to rounding."""

from __future__ import annotations

import math

import pytest
import torch

from zotune.rng.directions import Key
from zotune.weights.precision import HALF, join, split, stochastic_round

KEY = Key(0, 0, 0, "w", "rounding")


def numbers(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator) * torch.logspace(-3, 2, 20_000)
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, 0.99999994, 1.0000001, 255.99998, -0.49999997])
    return torch.cat([x, edges])


def test_bfloat16_and_residual_are_float32_bit_for_bit():
    x = numbers(torch.bfloat16)
    assert torch.equal(join(*split(x, torch.bfloat16)), x)


def test_float16_and_residual_are_float32_to_the_25th_bit():
    x = numbers(torch.float16)
    assert torch.allclose(join(*split(x, torch.float16)), x, rtol=2.0**-24, atol=2.0**-39)


@pytest.mark.parametrize("dtype", HALF)
def test_the_half_precision_part_is_the_nearest(dtype):
    x = numbers(dtype)
    half, _ = split(x, dtype)
    assert torch.all((half.float() - x).abs() <= (x.to(dtype).float() - x).abs())


@pytest.mark.parametrize("dtype", HALF)
def test_splitting_what_was_joined_changes_nothing(dtype):
    half, residual = split(numbers(dtype), dtype)
    again, residual_again = split(join(half, residual), dtype)
    assert torch.equal(half, again) and torch.equal(residual, residual_again)


@pytest.mark.parametrize("dtype", HALF)
def test_a_number_the_dtype_has_rounds_to_itself(dtype):
    x = numbers(dtype).to(dtype)
    assert torch.equal(stochastic_round(x.float(), dtype, KEY), x)


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_is_to_a_neighbor_right_on_average(dtype):
    spacing = torch.finfo(dtype).eps
    x = torch.full((200_000,), 1 + 0.3 * spacing)
    rounded = stochastic_round(x, dtype, KEY).double()
    assert set(rounded.unique().tolist()) == {1.0, 1 + spacing}
    share = float((rounded - 1).mean() / spacing)
    assert abs(share - float(x[0].double() - 1) / spacing) < 5 * math.sqrt(0.3 * 0.7 / x.numel())


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_is_keyed(dtype):
    x = numbers(dtype)
    assert torch.equal(stochastic_round(x, dtype, KEY), stochastic_round(x, dtype, KEY))
    assert not torch.equal(stochastic_round(x, dtype, KEY), stochastic_round(x, dtype, KEY._replace(step=1)))


@pytest.mark.parametrize("dtype", HALF)
def test_random_bits_of_stochastic_rounding_belong_to_elements(dtype):
    x = numbers(dtype)
    whole = stochastic_round(x, dtype, KEY)
    assert torch.equal(stochastic_round(x[1001:], dtype, KEY, first=1001), whole[1001:])


def test_float16_keeps_what_is_below_its_smallest_normal_number():
    x = torch.tensor([1e-5, 3.3e-6, -1e-7, 2.0**-24, 0.0])
    assert torch.allclose(join(*split(x, torch.float16)), x, rtol=0, atol=2.0**-40)
