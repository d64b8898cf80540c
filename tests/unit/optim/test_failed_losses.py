"""A loss of NaN of a function that may fail, as rewards may, counts for nothing; the others' estimate is theirs alone."""

from __future__ import annotations

import math

import pytest
import torch

import toys
from zotune import ZerothOrder, methods
from zotune.forward.losses import Losses
from zotune.methods.estimators import ESTIMATORS

NAN, EPS = math.nan, 1e-2


@pytest.mark.parametrize("name", ["central", "forward", "curvature"])
def test_a_failed_example_counts_at_no_point(name):
    estimator = ESTIMATORS[name]
    values = torch.randn(len(estimator.points(2)), 5, generator=torch.Generator().manual_seed(0))
    good = Losses(values[:, [0, 2, 4]], None, 2, 0).estimate(estimator, EPS)
    values[1, 1], values[0, 3] = NAN, NAN
    found = Losses(values, None, 2, 0).without_failed().estimate(estimator, EPS)
    assert torch.equal(found.coefficients, good.coefficients) and found.loss == good.loss and not any(found.skipped)


def test_a_failed_pair_leaves_the_mean_of_the_others():
    """(1/K) Σ c_k Z_k is the mean of (ℓ₊ − ℓ₋)/2ε · Z over the good pairs of an example and a direction."""
    owners = torch.tensor([0, 0, 1, 1, 2, 2])
    values = torch.tensor([[1.0, 2.0, NAN, 4.0, 5.0, 1.0], [0.5, 1.0, 2.0, 1.0, NAN, NAN]])
    found = Losses(values, owners, 3, 0).without_failed().estimate(ESTIMATORS["central"], EPS)
    sums = torch.tensor([0.5 + 1.0, 3.0, 0.0]) / (2 * EPS)
    assert torch.allclose(found.coefficients / 3, sums / 3)  # three pairs are good, whatever their number of directions
    assert found.skipped == (False, False, True)
    assert found.loss == pytest.approx((0.75 + 1.5 + 2.5) / 3)


def test_where_all_examples_failed_the_step_is_skipped():
    for owners in (None, torch.tensor([0, 1])):
        values = torch.tensor([[NAN, 1.0], [1.0, NAN]])
        found = Losses(values, owners, 2 if owners is not None else 1, 0).without_failed().estimate(ESTIMATORS["central"], EPS)
        assert all(found.skipped) and not found.coefficients.any()


@pytest.mark.parametrize("options", [{}, {"fitness": "prompt-z-score"}, {"directions_per": "example"}], ids=["shared", "fitness", "own"])
def test_a_run_goes_on_where_rewards_fail(options):
    """A measured rate too; without the attribute the same losses are non-finite ones, and the step is skipped."""

    def run(fails: bool) -> ZerothOrder:
        model = toys.classifier()
        losses = toys.loss_function(model)

        def loss(batch):
            found = losses(batch)
            return torch.where((batch[0][:, 0] == batch[0][0, 0]) & (batch[0][:, 1] == batch[0][0, 1]), NAN, found)

        loss.may_fail = fails
        optimizer = ZerothOrder(model, methods.lozo(eps=EPS, num_directions=2, **options), lr="auto")
        for step in range(3):
            optimizer.step(loss, toys.batch(8, seed=step))
            assert all(optimizer.last_report.skipped) != fails or options.get("directions_per")
            assert math.isfinite(optimizer.last_report.loss) == fails or options.get("directions_per")
            assert bool(optimizer.last_report.coefficients.any()) or not fails
        return optimizer

    assert max(run(True).last_report.lr) > 0
    run(False)
