"""The puzzles of examples/countdown.py have a solution, and its reward reads expressions without executing them."""

import itertools
import sys
from fractions import Fraction
from pathlib import Path

import pytest


@pytest.fixture
def countdown(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "examples")
    import countdown

    yield countdown
    sys.modules.pop("countdown")


def reaches(values, target):
    """Whether + - * / of some of the values give the target, by trying all."""
    if target in values:
        return True
    for first, second in itertools.permutations(range(len(values)), 2):
        rest = [value for place, value in enumerate(values) if place not in (first, second)]
        a, b = values[first], values[second]
        if any(reaches([*rest, value], target) for value in [a + b, a - b, a * b, *([a / b] if b else [])]):
            return True
    return False


def test_each_puzzle_has_a_solution(countdown):
    rows = countdown.rows(10, 0)
    assert all(reaches([Fraction(number) for number in row["numbers"]], row["target"]) for row in rows)
    assert rows == countdown.rows(10, 0) and rows != countdown.rows(10, 1)
    assert str(rows[0]["target"]) in rows[0]["prompt"] and str(rows[0]["numbers"]) in rows[0]["prompt"]


def test_the_reward_reads_expressions(countdown):
    solved, other = [" 3*4 + 2\nmore", "(4 - 2/2) * 3 + 3 + 2"], ["(3*4)", "2/3*4", "4"]
    wrong = ["", *["3*3", "3**4", "3//4", "4/(3-2-1)", "print(14)", "-3", "3(4)", "((3)", "14", "3*4+2=14", "3_4", "³"]]
    texts = [*solved, *other, *wrong]
    numbers = [[3, 4, 2], [2, 2, 2, 3, 3, 4], *[[3, 4, 2]] * (len(texts) - 2)]
    found = countdown.countdown_reward(completions=texts, numbers=numbers, target=[14] * len(texts))
    assert found == [1.0] * len(solved) + [0.1] * len(other) + [0.0] * len(wrong)
    assert countdown.countdown_reward(completions=["3/(2-2)"], numbers=[[3, 2, 2]], target=[1]) == [0.0] and numbers[0] == [3, 4, 2]
