"""Where a batch has one loss, how much of a coefficient is signal is guessed, and the guess is held to what steps achieve."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods
from zotune.optim.calibration.signal_prior import FIRST, MOST, SHORTEST, GuessedSignal
from zotune.optim.calibration.step_size import StepSize

FALL = 1e-3


def after(stretches: int, came: float) -> GuessedSignal:
    """A guess after so many stretches of steps, each of which lowered the loss by ``came`` times what was expected."""
    guess, loss = GuessedSignal(), 5.0
    while stretches:
        guess.expect(FALL)
        guess.record(loss)
        loss -= came * FALL
        stretches -= guess.later.count == 0
    return guess


@pytest.mark.parametrize(("came", "factor"), [(3.0, 2.0), (1.0, 1.0), (0.6, 1.0), (0.3, 0.5), (-1.0, 0.25)])
def test_a_guess_goes_by_the_part_of_the_fall_that_came(came, factor):
    assert after(1, came).signal == FIRST  # nothing to compare with
    assert after(2, came).signal == factor * FIRST


def test_a_guess_has_an_upper_end_but_no_lower_one():
    assert after(20, 3.0).signal == MOST
    assert after(20, -1.0).signal == FIRST / 4**19


def test_a_guess_that_is_not_held_to_anything_stays():
    guess = GuessedSignal(0.25, held=False)
    for _ in range(50):
        guess.expect(FALL)
        guess.record(5.0)
    assert guess.signal == 0.25


def test_noise_waits_until_a_fall_can_be_seen():
    """Of losses with noise σ a stretch of n steps tells a fall f n to two standard errors σ √(2/n) where n = (√8 σ / f)^(2/3)."""
    noise, fall = torch.Generator().manual_seed(0), 0.02
    guess, whole = GuessedSignal(), []
    for _ in range(600):
        guess.expect(fall)
        before = guess.later.count
        guess.record(5.0 + float(torch.randn((), generator=noise)))
        whole += [before + 1] if guess.later.count == 0 else []
        guess.signal = FIRST
    assert 0.6 < statistics.mean(whole) / (8**0.5 / fall) ** (2 / 3) < 1.4


def test_a_loss_that_rises_for_sure_is_not_waited_for():
    guess = after(1, 0.0)
    for _ in range(SHORTEST):
        guess.record(5.1)  # nothing expected
    assert guess.signal == FIRST / 4


def test_what_others_did_is_nobodys_achievement():
    size = StepSize()
    size.guess = after(1, 1.0)
    size.fade()
    assert size.guess.earlier.count  # nobody else has moved
    size.waited = 1
    size.fade()
    assert size.guess == GuessedSignal()


def test_a_guess_is_for_steps_that_show_nothing():
    size = StepSize()
    assert size.signal == FIRST
    for _ in range(50):
        size.expected_fall = FALL
        size.expect(1.0)
        size.record_step([1.0], 5.0)
    assert size.signal < FIRST / 8
    size.record_examples(torch.ones(1, 4))  # four examples that agree
    assert size.signal == 1.0


def test_a_schedule_lowers_what_is_expected():
    size = StepSize(expected_fall=FALL)
    size.expect(0.25)
    assert size.guess.expected == FALL / 4


def test_the_state_comes_back():
    size = StepSize()
    size.guess = after(3, 0.3)
    assert StepSize.restored(size.state()) == size


def one(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of one example whose answers are drawn: there is nothing to learn but how often each is right."""
    tokens, _ = toys.batch(1, seed=step)
    return tokens, torch.randint(0, 4, tokens.shape, generator=torch.Generator().manual_seed(10_000 + step))


def answering_at_random() -> nn.Module:
    """A classifier that says nothing yet: its loss is log 4, the least there is for answers that are drawn."""
    model = toys.classifier()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.zero_()
    return model


@pytest.mark.parametrize("name", ["mezo", "lozo-m"])
def test_single_examples_without_signal_do_no_lasting_harm(name):
    whole = tuple(torch.cat(parts) for parts in zip(*(one(step) for step in range(500, 700)), strict=True))
    ends = []
    for seed in range(3):
        model = answering_at_random()
        optimizer = ZerothOrder(model, toys.method(name, eps="auto"), lr="auto", seed=seed)
        loss_fn = toys.loss_function(model)
        for step in range(500):
            optimizer.step(loss_fn, one(step))
        with torch.no_grad():
            ends.append(float(loss_fn(whole).mean()))
    assert statistics.mean(ends) < 1.02 * math.log(4)


def test_a_run_of_single_examples_goes_on_bit_for_bit():
    def build() -> tuple[nn.Module, ZerothOrder]:
        model = toys.classifier()
        return model, ZerothOrder(model, methods.lozo_e(eps="auto", interval=50), lr="auto")

    def run(model: nn.Module, optimizer: ZerothOrder, first: int, last: int) -> list[float]:
        return [float(optimizer.step(toys.loss_function(model), toys.batch(1, seed=step))) for step in range(first, last)]

    straight, optimizer = build()
    losses = run(straight, optimizer, 0, 60)
    assert optimizer.calibrator.step_size.guess.earlier.count
    halted, first = build()
    run(halted, first, 0, 25)
    resumed, second = build()
    resumed.load_state_dict(copy.deepcopy(halted.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(resumed, second, 25, 60) == losses[25:]
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True))
