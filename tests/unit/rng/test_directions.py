"""Law 2: a direction is a pure function of its key; the global generators are neither read nor advanced."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zotune.io.execution import Execution, executing
from zotune.rng import directions as drawing
from zotune.rng.directions import CPU_BLOCK, SHARED_CPU_BLOCK, Directions, Key, for_blocks, uniform_integers
from zotune.subspaces import Full
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.flat_buffer import build_flat_buffers

KEY = Key(seed=7, step=3, direction=1, name="model.layers.0.weight")
LARGE = (3, CPU_BLOCK + 5)
CPU = torch.device("cpu")


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


def test_gaussian_has_the_distribution_function_of_a_gaussian():
    z = Directions("gaussian").draw(KEY, (400_000,)).double().sort().values
    empirical = torch.arange(1, z.numel() + 1, dtype=torch.float64) / z.numel()
    distance = float((torch.special.ndtr(z) - empirical).abs().max())
    assert distance < 2.0 / math.sqrt(z.numel())  # Kolmogorov and Smirnov: exceeded once in 1500 samples of a true normal
    assert 4.0 < float(z[-1]) < 4.3 and -4.3 < float(z[0]) < -4.0


@pytest.mark.parametrize("kind, power", [("gaussian", 1), ("gaussian", 2), ("gaussian", 3), ("rademacher", 1), ("sphere", 1)])
@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 64, 100, 1 << 15, 1 << 17])
def test_elements_and_their_powers_are_uncorrelated_at_any_lag(kind, power, lag):
    z = Directions(kind).draw(KEY, (1 << 19,)).double().pow(power)
    z = (z - z.mean()) / z.std()
    assert abs(float(z[lag:] @ z[:-lag])) < 5 * math.sqrt(z.numel() - lag)


@pytest.mark.parametrize("kind", Directions.KINDS)
def test_directions_of_neighboring_keys_are_independent(kind):
    count, numel = 48, 4096
    keys = [KEY._replace(seed=s, step=t, direction=k, name=n) for s in (0, 1) for t in range(4) for k in range(3) for n in ("a", "b")]
    z = torch.stack([Directions(kind).draw(key, (numel,)) for key in keys]).double()
    gram = z @ z.T / math.sqrt(numel)
    above = gram[torch.triu(torch.ones(count, count, dtype=torch.bool), 1)]
    assert float(above.abs().max()) < 5
    assert abs(float(above.square().mean()) - 1) < 5 * math.sqrt(2 / above.numel())


@pytest.mark.parametrize("size", [1000, SHARED_CPU_BLOCK, 100_000, 1 << 17, 1 << 20])
@pytest.mark.parametrize("kind", Directions.KINDS)
def test_numbers_do_not_depend_on_the_size_of_blocks(kind, size):
    directions = Directions(kind)
    expected = directions.draw(KEY, (300_001,))
    with executing(Execution(block_size=size)):
        drawn = directions.draw(KEY, (300_001,))
    if kind != "sphere" or size % SHARED_CPU_BLOCK == 0:  # its squares are added up in parts of SHARED_CPU_BLOCK; blocks hold whole parts
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_any_part_may_be_drawn_alone(kind):
    directions = Directions(kind)
    whole = directions.draw(KEY, (400_000,))
    parts = [(0, 1), (5, 77), (131_000, 131_100), (131_072, 262_144), (262_100, 262_200), (399_999, 400_000)]
    for part in (slice(*ends) for ends in parts):
        assert torch.equal(directions.block(KEY, part, CPU), whole[part])
        assert torch.equal(directions.block(KEY, part, CPU, 1e-3), whole[part] * 1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("columns", [64, 100, 131])
def test_any_rows_may_be_drawn_alone(kind, columns):
    directions = Directions(kind)
    whole = directions.draw(KEY, (3000, columns))
    rows = torch.tensor([2999, 0, 17, 17, 1311])
    assert torch.equal(directions.rows(KEY, rows, columns), whole[rows])


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("numel", [5, 768, 20_000, 140_000])
def test_many_directions_at_once_are_those_drawn_one_by_one(kind, numel):
    directions = Directions(kind)
    many = directions.draw_many(KEY, 4, (numel,))
    one_by_one = [directions.draw(KEY._replace(direction=k), (numel,)) for k in range(KEY.direction, KEY.direction + 4)]
    assert torch.equal(many, torch.stack(one_by_one))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("count", [1, 3])
def test_parameters_drawn_together_are_those_drawn_alone(kind, count):
    directions, names, numels = Directions(kind), ["a", "b", "c"], [768, 5, 1001]
    together = directions.draw_together(KEY, count, names, numels, CPU).split(numels, dim=1)
    for name, numel, z in zip(names, numels, together, strict=True):
        assert torch.equal(z, directions.draw_many(KEY._replace(name=name), count, (numel,)))


@pytest.mark.parametrize("kind", Directions.KINDS)
@pytest.mark.parametrize("k", [1, 4, 40])
def test_a_coordinate_has_the_same_directions_grouped_or_alone(kind, k):
    directions = Directions(kind)
    shapes = {"a": (30,), "b": (7, 3), "c": (100, 20), "large": (100, 100, 1)}
    alone = [Full().coordinate(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    beside = [Full().coordinate(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    build_flat_buffers(beside)
    weights = [0.1 * (i + 1) for i in range(k)]
    for direction in range(k):
        for a, b in zip(alone, beside, strict=True):
            offset = Offset(1e-2, 0, 3, direction)
            assert torch.equal(a.at(directions, offset), b.at(directions, offset))
    for a, b in zip(alone, beside, strict=True):
        a.descend(directions, weights, 0.9, 0, 3)
        b.descend(directions, weights, 0.9, 0, 3)
        assert torch.equal(a.parameter, b.parameter)


def test_the_update_does_not_draw_all_parameters_for_each(monkeypatch):
    calls = []
    inner = Directions.draw_together
    monkeypatch.setattr(Directions, "draw_together", lambda *args: calls.append(1) or inner(*args))
    coordinates = [Full().coordinate(str(i), nn.Parameter(torch.ones(30))) for i in range(50)]
    build_flat_buffers(coordinates)
    directions = Directions("gaussian")
    for direction in range(40):
        for coordinate in coordinates:
            coordinate.at(directions, Offset(1e-2, 0, 3, direction))
    for coordinate in coordinates:
        coordinate.descend(directions, [0.1] * 40, 1.0, 0, 3)
    assert len(calls) == 5  # {0}, {1, 2, 3}, {4..15}, {16..31}, {32..47}


def test_a_buffer_made_in_inference_mode_serves_outside_it():
    drawing._workspaces.cached.clear()
    with torch.inference_mode():
        inside = Directions("gaussian").draw(KEY, LARGE)
    assert torch.equal(Directions("gaussian").draw(KEY, LARGE), inside)


@pytest.mark.parametrize(("kind", "bytes_a_number"), [("gaussian", 6), ("rademacher", 4.5)])
def test_a_block_takes_the_memory_of_its_numbers_and_index(kind, bytes_a_number):
    room = drawing._Workspace.of(Directions(kind).source, 1 << 10, CPU)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (room.words, room.spare, room.index, room.numbers)}
    assert sum(memory.values()) == bytes_a_number * room.numbers.numel()
    assert room.words.data_ptr() + room.words.nbytes <= room.spare.data_ptr()


def test_blocks_cover_everything_once():
    seen = torch.zeros(700_001)
    for_blocks(700_001, CPU, lambda part: seen[part].add_(1))
    assert bool((seen == 1).all())


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
    uniform_integers(KEY, slice(0, 100), 16, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(Directions(kind).draw(KEY, LARGE), first)


def test_an_unknown_distribution_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        Directions("gausian")
