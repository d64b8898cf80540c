"""Law 2: a direction is a pure function of its key; the global generators are neither read nor advanced."""

from __future__ import annotations

import math

import pytest
import torch

from zotune.directions import CPU_BLOCK, Directions, Key, uniform_integers

KEY = Key(seed=7, step=3, direction=1, name="model.layers.0.weight")
LARGE = (9, CPU_BLOCK + 5)


@pytest.mark.parametrize("kind", Directions.KINDS)
@pytest.mark.parametrize("shape", [(1,), (5, 3), LARGE])
def test_the_same_key_gives_the_same_numbers(kind, shape):
    assert torch.equal(Directions(kind).draw(KEY, shape), Directions(kind).draw(KEY, shape))


@pytest.mark.parametrize("kind", Directions.KINDS)
def test_numbers_do_not_depend_on_order_or_threads(kind):
    directions, threads = Directions(kind), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = directions.draw(KEY, LARGE)
        torch.set_num_threads(4)
        directions.draw(KEY._replace(step=99), LARGE)
        assert torch.equal(alone, directions.draw(KEY, LARGE))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("change", [{"seed": 8}, {"step": 4}, {"direction": 0}, {"name": "model.layers.1.weight"}])
@pytest.mark.parametrize("kind", Directions.KINDS)
def test_every_part_of_the_key_counts(kind, change):
    a, b = Directions(kind).draw(KEY, (4096,)), Directions(kind).draw(KEY._replace(**change), (4096,))
    correlation = float(a @ b) / 4096
    assert abs(correlation) < 5 / math.sqrt(4096)


def test_blocks_of_one_parameter_are_independent():
    z = Directions("gaussian").draw(KEY, (2, CPU_BLOCK))
    assert abs(float(z[0] @ z[1])) / CPU_BLOCK < 5 / math.sqrt(CPU_BLOCK)


@pytest.mark.parametrize("kind", Directions.KINDS)
def test_mean_zero_and_unit_variance(kind):
    z = Directions(kind).draw(KEY, (400_000,)).double()
    assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / z.numel())


def test_gaussian_has_the_fourth_moment_of_a_gaussian():
    z = Directions("gaussian").draw(KEY, (400_000,)).double()
    assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96 / z.numel())


def test_rademacher_is_signs():
    z = Directions("rademacher").draw(KEY, (1000,))
    assert set(z.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("numel", [1, 10, 3 * CPU_BLOCK + 1])
def test_the_sphere_has_radius_root_d(numel):
    z = Directions("sphere").draw(KEY, (numel,)).double()
    assert float(z.norm()) == pytest.approx(math.sqrt(numel), rel=1e-6)


@pytest.mark.parametrize("kind", Directions.KINDS)
def test_combine_is_the_weighted_sum(kind):
    directions, other = Directions(kind), KEY._replace(direction=0)
    expected = 0.5 * directions.draw(KEY, LARGE) - 2.0 * directions.draw(other, LARGE)
    assert torch.allclose(directions.combine([(KEY, 0.5), (other, -2.0)], LARGE), expected, atol=1e-5)


@pytest.mark.parametrize("kind", Directions.KINDS)
def test_the_global_generator_is_neither_read_nor_advanced(kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = Directions(kind).draw(KEY, LARGE)
    uniform_integers(KEY, 0, 100, 16, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(Directions(kind).draw(KEY, LARGE), first)


def test_an_unknown_distribution_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        Directions("gausian")
