"""The cross-validated logistic regression of a linear probe."""

from __future__ import annotations

import pytest
import torch

from zotune.baselines import catalog
from zotune.baselines.logistic_regression import INVERSE_PENALTIES, fit_by_folds


def _noisy() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 12, generator=generator)
    answers = (features[:, 0] + torch.randn(60, generator=generator) > 0).long()
    return features, answers


def test_the_penalty_is_one_of_ten_and_the_probe_its_minimum():
    features, answers = _noisy()
    probe = fit_by_folds(features, answers, 2, 5)
    wrong = probe.scores(features).double().exp() - torch.nn.functional.one_hot(answers, 2)
    pull = wrong.T @ features.double()  # at the minimum C Σ (p − y) h = −A
    inverse = float(-(probe.weight * pull).sum() / pull.square().sum())
    assert min(abs(inverse / each - 1) for each in INVERSE_PENALTIES) < 1e-2
    assert inverse < 1, "with labels of noise a strong penalty does best on held-out folds"
    assert not probe.bias.any() and not probe.mean.any()


def test_too_many_folds_are_refused():
    features, answers = _noisy()
    with pytest.raises(ValueError, match="the rarest class has"):
        fit_by_folds(features, answers, 2, 50)
    with pytest.raises(ValueError, match="folds must be 0"):
        catalog.get("linear-probe", folds=1)
