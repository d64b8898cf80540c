"""The contract of reward functions: arguments, weights, and what becomes of failed rows."""

import asyncio
import math

import numpy as np
import pytest
import torch

from zotune.rewards import Rewards

PROMPTS, TEXTS = ["one", "two", "three"], ["a", "bb", "ccc"]


def lengths(completions, **columns):
    return [len(text) for text in completions]


def listing(values):
    def listed(completions):
        return values if len(completions) > 1 else values[:1]

    return listed


def test_columns_and_ids_are_given_by_keyword():
    def judged(prompts, completions, completion_ids, target):
        return [f"{p}{c}{i}" == t for p, c, i, t in zip(prompts, completions, completion_ids, target, strict=True)]

    scores = Rewards(judged).score(PROMPTS, TEXTS, {"target": ["onea[1]", "", "threeccc[3]"], "other": [0, 0, 0]}, [[1], [2], [3]])
    assert scores.total.tolist() == [1.0, 0.0, 1.0] and not scores.failures


def test_texts_beside_messages_become_messages():
    seen = []

    def keep(prompts, completions):
        seen.extend(completions)
        return [0] * len(prompts)

    Rewards(keep).score([[{"role": "user", "content": "hi"}], "plain"], ["a", "b"])
    assert seen == [[{"role": "assistant", "content": "a"}], "b"]


def test_total_is_the_weighted_sum_of_those_that_judge():
    def odd(completions):
        return [1.0 if len(text) % 2 else None for text in completions]

    scores = Rewards([lengths, odd, lengths], [1, 10, 0.5]).score(PROMPTS, TEXTS)
    np.testing.assert_array_equal(scores.total, [11.5, 3.0, 14.5])
    np.testing.assert_array_equal(scores.by_function["odd"], [1, math.nan, 1])
    assert list(scores.by_function) == ["lengths", "odd", "lengths_2"] and not scores.failures


def test_a_sum_that_is_not_finite_fails_its_row():
    scores = Rewards([listing([1e308, 1.0]), listing([1e308, 1.0])]).score(["p", "p"], ["a", "b"])
    np.testing.assert_array_equal(scores.total, [math.nan, 2])
    assert "has no finite weighted sum for row 0" in str(scores.failures[0])


def test_numbers_of_other_libraries_count():
    values = [True, np.float32(2), torch.tensor(3.0), np.array([4])]
    scores = Rewards([listing(values), listing(torch.ones(4)), listing(np.ones(4))]).score(["p"] * 4, ["c"] * 4)
    assert scores.total.tolist() == [3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "returned nan, which is not finite,"),
        (-math.inf, "returned -inf, which is not finite,"),
        ("0.5", "returned '0.5', which is not a number,"),
        ([1], "returned [1], which is not a number,"),
        (np.ones(2), "returned array([1., 1.]), which is not a number,"),
        (10**400, "returned a value of type int, which is no finite float,"),
        (None, "returned None"),
    ],
)
def test_a_value_that_is_no_number_fails_its_row_alone(value, reason):
    scores = Rewards(listing([1.0, value])).score(["p", "Which?"], ["c", "x" * 100], numbers=[7, 8])
    np.testing.assert_array_equal(scores.total, [1, math.nan])
    where = f"for row 8 of the data (prompt 'Which?', completion '{'x' * 60}…')"
    assert [(each.row, str(each)) for each in scores.failures] == [(1, f"reward function 'listed' {reason} {where}")]


def test_an_exception_fails_the_rows_that_raise():
    calls = []

    def fragile(completions):
        calls.append(len(completions))
        if "bb" in completions:
            raise KeyError("bb")
        return [1.0] * len(completions)

    scores = Rewards([fragile, lengths]).score(PROMPTS, TEXTS)
    np.testing.assert_array_equal(scores.total, [2, math.nan, 4])
    assert calls == [3, 1, 1, 1] and "'fragile' raised KeyError: 'bb' for row 1 of the batch" in str(scores.failures[0])


def test_an_exception_that_no_single_row_raises_is_warned_of():
    def small(completions):
        if len(completions) > 1:
            raise MemoryError
        return [1.0]

    with pytest.warns(UserWarning, match="'small' raised MemoryError for 3 rows at once, and for none of them alone"):
        assert Rewards(small).score(PROMPTS, TEXTS).total.tolist() == [1.0, 1.0, 1.0]


def test_interruptions_pass():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rewards(interrupted).score(PROMPTS, TEXTS)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "'listed' returned 1 values for 3 completions"),
        (None, "'listed' returned None; it must return a list of 3 numbers"),
        ("abc", "'listed' returned a value of type str"),
        ({0: 1, 1: 1, 2: 1}, "'listed' returned a value of type dict"),
        (np.ones((3, 1)), "'listed' returned a value of type ndarray"),
    ],
)
def test_a_result_that_is_no_list_of_values_stops(result, message):
    with pytest.raises(ValueError, match=message):
        Rewards(listing(result)).score(PROMPTS, TEXTS)


def test_a_missing_column_stops():
    def needs(completions, target):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="'needs' asks for 'target', which is no column of the data \\(columns: 'answer'\\)"):
        Rewards(needs).score(PROMPTS, TEXTS, {"answer": TEXTS})


def test_columns_that_do_not_fit_stop():
    with pytest.raises(ValueError, match="3 prompts and 2 values of 'answer'"):
        Rewards(lengths).score(PROMPTS, TEXTS, {"answer": TEXTS[:2]})
    with pytest.raises(ValueError, match="a column named 'completions'"):
        Rewards(lengths).score(PROMPTS, TEXTS, {"completions": TEXTS})


def test_asynchronous_functions_run_beside_a_running_loop_too():
    async def later(completions):
        await asyncio.sleep(0)
        return lengths(completions)

    async def notebook():
        return Rewards(later).score(PROMPTS, TEXTS)

    assert Rewards(later).score(PROMPTS, TEXTS).total.tolist() == asyncio.run(notebook()).total.tolist() == [1.0, 2.0, 3.0]


def test_a_function_cannot_change_the_lists_of_the_next():
    def greedy(completions):
        return [len(completions.pop()) for _ in list(completions)]

    assert Rewards([greedy, lengths]).score(PROMPTS, TEXTS).total.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        ([], None, "at least one reward function"),
        ([lengths], [1, 2], "reward_weights has 2 values for 1 reward functions"),
        ([lengths], [math.nan], "reward_weights must be finite"),
        ([3], None, "must be callable, and 3 is not"),
    ],
)
def test_what_makes_no_rewards_is_refused(functions, weights, message):
    with pytest.raises(ValueError, match=message):
        Rewards(functions, weights)


def test_the_run_stops_when_too_many_rows_failed(caplog):
    rewards = Rewards(lambda completions: [None if text == "bad" else 1.0 for text in completions], max_failed=3)
    for _ in range(3):
        rewards.score(["p", "p"], ["good", "bad"])
    assert len(caplog.records) == 1 and "'<lambda>' returned None for row 1" in caplog.text
    with pytest.raises(ValueError, match=r"4 rows have no reward, more than max_failed_rewards = 3; the last: reward function '<lambda>'"):
        rewards.score(["p"], ["bad"])


def test_the_run_stops_when_the_first_batch_has_no_reward():
    def broken(completions):
        raise RuntimeError("no server")

    with pytest.raises(ValueError, match="no row of the first batch has a reward: reward function 'broken' raised RuntimeError: no server"):
        Rewards(broken).score(PROMPTS, TEXTS)


@pytest.mark.parametrize(("function", "words"), [("exact_match", "'reference' or 'answer'"), (lambda completions, wanted: [], "'wanted'")])
def test_a_missing_column_is_seen_before_a_call(function, words):
    Rewards(function).check(["answer", "wanted"])
    with pytest.raises(ValueError, match=words):
        Rewards(function).check(["other"])
