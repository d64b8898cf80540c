"""Random words from counters: the same anywhere, and as good as random."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from zotune.rng.counter import PAGE, Key, mix64, multiplier, multipliers, stream, words, words_at, words_many
from zotune.rng.tables import half_normal, normal_pairs, sign_bytes

KEY = Key(seed=7, step=3, direction=1, name="model.layers.0.weight")
CPU = torch.device("cpu")


def draw(key: Key, first: int, count: int) -> torch.Tensor:
    return words(key, first, count, torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64))


def pages(key: Key, count: int) -> torch.Tensor:
    return torch.cat([draw(key, page * PAGE, PAGE) for page in range(count)])


def assert_uniform(symbols: torch.Tensor, kinds: int) -> None:
    """Pearson's statistic within 5 standard deviations of its mean, both ways."""
    counts = torch.bincount(symbols, minlength=kinds).double()
    expected = symbols.numel() / kinds
    statistic = float((counts - expected).square().sum() / expected)
    assert abs(statistic - (kinds - 1)) < 5 * math.sqrt(2 * (kinds - 1))


def test_the_formula_in_integers_of_python():
    mask = (1 << 64) - 1

    def word(key: Key, number: int) -> int:
        page, place = divmod(number, PAGE)
        start = int.from_bytes(hashlib.blake2b(f"page|{key.seed}|{key.step}".encode(), digest_size=8).digest(), "little")
        b = mix64(start + (place + 1) * 0x9E3779B97F4A7C15)
        x = b * (multiplier(stream(key), page) & mask) & mask
        high = x >> 32 | (0xFFFFFFFF00000000 if x >> 63 else 0)
        return (x ^ high) * 0x9E3779B97F4A7C15 & mask

    drawn = pages(KEY, 3)
    for number in (0, 1, 77, PAGE - 1, PAGE, 2 * PAGE + 5):
        assert int(drawn[number]) & mask == word(KEY, number)


def test_words_never_change():
    """Journals are replayed with these numbers: what this test pins must stay what it is."""
    digest = hashlib.sha256(pages(KEY, 2).numpy().tobytes()).hexdigest()
    assert digest[:16] == "7bd59f336d4e51ab"
    assert hashlib.sha256(normal_pairs(CPU).numpy().tobytes()).hexdigest()[:16] == "10e2d82fd6b9b156"


@pytest.mark.parametrize("first, count", [(0, 1), (5, 100), (PAGE - 3, 3), (PAGE - 3, 10), (PAGE, PAGE), (7, 2 * PAGE)])
def test_any_part_of_a_stream_may_be_had_alone(first, count):
    whole = pages(KEY, 3)
    assert torch.equal(draw(KEY, first, count), whole[first : first + count])
    assert torch.equal(words_at(KEY, torch.arange(first, first + count)), whole[first : first + count])


def test_streams_of_several_directions_at_once():
    together = words_many(KEY, 3, 50, CPU)
    assert torch.equal(together, torch.cat([draw(KEY._replace(direction=KEY.direction + k), 0, 50) for k in range(3)]))


def test_multipliers_are_odd_and_those_of_the_integers():
    origin = stream(KEY)
    many = multipliers(origin, torch.arange(100))
    assert many.tolist() == [multiplier(origin, page) for page in range(100)]
    assert bool((many & 1 == 1).all())


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return pages(KEY, 64)


@pytest.mark.parametrize("chunk", range(4))
def test_every_16_bits_of_a_word_are_uniform(sample, chunk):
    assert_uniform(sample.view(torch.uint16).int()[chunk::4], 1 << 16)


@pytest.mark.parametrize("distance", [0, 1, PAGE])
def test_pairs_of_bytes_are_uniform(sample, distance):
    """Inside a word, of neighboring words, of the same place in neighboring pages (which share B)."""
    octets = sample.view(torch.uint8).int().view(-1, 8)
    later = octets[distance:]
    for i in range(8):
        for j in range(8):
            if distance or i < j:
                assert_uniform(octets[: later.shape[0], i] * 256 + later[:, j], 1 << 16)


@pytest.mark.parametrize("change", [{"seed": 8}, {"step": 4}, {"direction": 2}, {"name": "b"}, {"purpose": "rounding"}])
def test_streams_of_neighboring_keys_share_nothing(sample, change):
    other = pages(KEY._replace(**change), 8)
    mixed = (sample[: other.numel()] ^ other).view(torch.uint16).int()
    for chunk in range(4):
        assert_uniform(mixed[chunk::4], 1 << 16)


def test_bits_are_uncorrelated(sample):
    bits = ((sample[: 1 << 18].unsqueeze(1) >> torch.arange(64)) & 1).float().mul_(2).sub_(1)
    for lag in (0, 1, PAGE):
        a, b = bits[: bits.shape[0] - lag], bits[lag:]
        correlation = (a.T @ b) / math.sqrt(a.shape[0])
        if not lag:
            correlation.fill_diagonal_(0)
        assert float(correlation.abs().max()) < 5.5


@pytest.mark.parametrize("half", [0, 1])
def test_repetitions_among_32_bits_are_as_many_as_chance_makes(sample, half):
    values = sample.view(torch.int32)[half::2]
    repeated = values.numel() - values.unique().numel()
    expected = values.numel() ** 2 / 2**33
    assert abs(repeated - expected) < 5 * math.sqrt(expected)


def test_the_table_of_normals_has_the_moments_of_a_normal():
    pairs = normal_pairs(CPU).double()
    assert pairs.mean(0).tolist() == [0.0, 0.0]
    for column in pairs.T:
        assert column.unique().numel() == 1 << 15
        assert float(column.square().mean()) == pytest.approx(1, abs=1e-7)
        assert float(column.pow(4).mean()) == pytest.approx(3, abs=1e-3)
        ordered = column.sort().values.unique()
        middle = (torch.arange(1 << 15, dtype=torch.float64) + 0.5) / (1 << 15)
        assert float((torch.special.ndtr(ordered) - middle).abs().max()) < 2.0**-15
    assert float((pairs[:, 0] * pairs[:, 1]).mean()) == 0
    assert float((pairs[:, 0].square() * pairs[:, 1].square()).mean()) == pytest.approx(1, abs=1e-4)
    assert float((half_normal() * 2**20 % 1).abs().max()) == 0


def test_the_pairs_fill_the_plane_as_a_normal_does():
    pairs = normal_pairs(CPU).double()
    square = pairs.square().sum(1)
    for level in (0.5, 1, 2, 4, 8, 12):
        share = math.exp(-level / 2)
        assert abs(float((square > level).double().mean()) - share) < 1e-3
    for angle in (0.1, 0.7, 1.2, 2.0, 2.9):
        turned = math.cos(angle) * pairs[:, 0] + math.sin(angle) * pairs[:, 1]
        ordered = turned.sort().values
        middle = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
        assert float((torch.special.ndtr(ordered) - middle).abs().max()) < 1e-3


def test_a_byte_is_its_eight_signs():
    assert sign_bytes(CPU)[0b00000101].tolist() == [-1, 1, -1, 1, 1, 1, 1, 1]
