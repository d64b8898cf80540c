"""Fitness as an option of a method that compares pairs of points: the step is its equation, and runs learn at a measured rate."""

from __future__ import annotations

import copy

import pytest
import torch

import toys
from zotune import ZerothOrder, methods, replay
from zotune.rng.directions import Directions, Key


def test_a_step_by_prompt_z_scores_is_its_equation():
    """θ ← θ − η (1/2K) Σ_k (s_k₊ − s_k₋) Z_k, s the mean over examples of the z-score within an example's points."""
    model, eps, lr, k = toys.classifier(), 1e-2, 1e-2, 3
    before, x = copy.deepcopy(model).requires_grad_(False), toys.batch(5)
    draw = Directions("gaussian").draw
    z = [{name: draw(Key(0, 0, j, name), p.shape) for name, p in before.named_parameters()} for j in range(k)]
    rows = []
    for sign in (1, -1):
        for j in range(k):
            moved = copy.deepcopy(before)
            for name, p in moved.named_parameters():
                p.add_(z[j][name], alpha=sign * eps)
            rows.append(toys.loss_function(moved)(x))
    table = torch.stack(rows).double()
    s = ((table - table.mean(dim=0)) / table.std(dim=0, unbiased=False)).mean(dim=1)
    ZerothOrder(model, methods.mezo(fitness="prompt-z-score", num_directions=k, eps=eps), lr=lr).step(toys.loss_function(model), x)
    for name, p in before.named_parameters():
        for j in range(k):
            p.add_(z[j][name], alpha=float(-lr * (s[j] - s[k + j]) / (2 * k)))
        assert torch.allclose(model.get_parameter(name), p, atol=2e-6), name


@pytest.mark.parametrize("fitness", ["ranks", "prompt-z-score"])
def test_learns_at_a_measured_rate_and_replays(fitness, tmp_path):
    model = toys.classifier()
    method = methods.lozo(fitness=fitness, num_directions=8, eps=1e-2)
    optimizer = ZerothOrder(model, method, lr="auto", journal=tmp_path / "j")
    losses = [float(optimizer.step(toys.loss_function(model), toys.batch(16, seed=step))) for step in range(80)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    rebuilt = toys.classifier()
    replay(rebuilt, tmp_path / "j").remove_hooks()
    optimizer.remove_hooks()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), rebuilt.state_dict().values(), strict=True))


def test_a_measured_step_is_as_long_whatever_the_fitness():
    lengths = {}
    for fitness in ("raw", "z-score", "ranks", "prompt-z-score"):
        model = toys.classifier()
        optimizer = ZerothOrder(model, methods.lozo(fitness=fitness, num_directions=8, eps=1e-2), lr="auto")
        optimizer.step(toys.loss_function(model), toys.batch(16))
        report = optimizer.last_report
        lengths[fitness] = report.lr[0] * float(report.coefficients.norm())
    assert list(lengths.values()) == pytest.approx([lengths["raw"]] * 4, rel=0.5)
    assert lengths["ranks"] == pytest.approx(lengths["prompt-z-score"], rel=1e-3)
