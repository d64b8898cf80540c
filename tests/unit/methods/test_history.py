"""Moments made again from the last steps' coefficients are those that the plain rule would have kept."""

from __future__ import annotations

import copy

import pytest
import torch

import toys
from zotune import ZerothOrder, methods
from zotune.methods.rules import Rule
from zotune.optim.calibration.gains import gain
from zotune.optim.step_transforms import HistoryTransform
from zotune.rng.directions import Directions, Key


def estimates(optimizer: ZerothOrder, past, model) -> list[dict[str, torch.Tensor]]:
    """ĝ of each step of ``past``, by parameter."""
    out = []
    for step, coefficients in past:
        names = {n: p.shape for n, p in model.named_parameters()}
        draw = {n: [Directions("gaussian").draw(Key(0, step, k, n), shape) for k in range(len(coefficients))] for n, shape in names.items()}
        out.append({n: sum(c * z for c, z in zip(coefficients, draw[n], strict=True)) / len(coefficients) for n in names})
    return out


@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("name", ["replayed-momentum", "replayed-adam"])
def test_an_update_is_the_plain_rules_started_h_steps_ago(name, num_directions):
    h, lr = 4, 1e-2
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.get(name, history=h, num_directions=num_directions), lr=lr)
    past: list[tuple[int, list[float]]] = []
    for step in range(9):
        before = copy.deepcopy(model)
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
        past = [*past, (step, optimizer.last_report.coefficients.tolist())][-h:]
        scratch = copy.deepcopy(before)
        if name == "replayed-adam":
            rule = torch.optim.Adam(scratch.parameters(), lr=lr, betas=(0.7, 0.9))
        else:
            rule = torch.optim.SGD(scratch.parameters(), lr=lr, momentum=0.9)
        for place, estimate in enumerate(estimates(optimizer, past, model)):
            if place == len(past) - 1:
                scratch.load_state_dict(before.state_dict())  # only the last of these updates counts
            for n, parameter in scratch.named_parameters():
                parameter.grad = estimate[n]
            rule.step()
        for ours, theirs in zip(model.parameters(), scratch.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(("replayed", "plain"), [("replayed-momentum", "mezo-momentum"), ("replayed-adam", "mezo-adam")])
def test_with_all_of_the_history_it_is_the_plain_method(replayed, plain):
    models = toys.classifier(), toys.classifier()
    betas = {"betas": (0.7, 0.9)} if plain == "mezo-adam" else {}
    a = ZerothOrder(models[0], methods.get(replayed, history=12), lr=3e-3)
    b = ZerothOrder(models[1], methods.get(plain, **betas), lr=3e-3)
    for step in range(12):
        a.step(toys.loss_function(models[0]), toys.batch(seed=step))
        b.step(toys.loss_function(models[1]), toys.batch(seed=step))
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_without_bias_correction_it_is_adamezos_update():
    """θ ← θ − η m / √(v + 1e-8), m and v summed from the last h estimates (2605.00650)."""
    h, lr = 3, 1e-2
    model = toys.classifier()
    method = methods.replayed_adam(history=h, bias_correction=False)
    optimizer = ZerothOrder(model, method, lr=lr)
    past: list[tuple[int, list[float]]] = []
    for step in range(5):
        before = copy.deepcopy(dict(model.named_parameters()))
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
        past = [*past, (step, optimizer.last_report.coefficients.tolist())][-h:]
        found = estimates(optimizer, past, model)[::-1]
        for n, parameter in model.named_parameters():
            mean = sum(0.3 * 0.7**age * g[n] for age, g in enumerate(found))
            square = sum(0.1 * 0.9**age * g[n].square() for age, g in enumerate(found))
            assert torch.allclose(parameter, before[n] - lr * mean / (square + 1e-8).sqrt(), atol=2e-6)
    rule = Rule("SGD", {})
    unit = gain(methods.replayed_adam(history=h), rule, 4.0, 1, 1e-3)
    assert gain(method, rule, 4.0, 1, 1e-3) == pytest.approx(unit * (1 - 0.9**h) ** 0.5 / (1 - 0.7**h))


def test_what_it_keeps_is_numbers():
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.replayed_adam(history=3, num_directions=2), lr=1e-3)
    for step in range(5):
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
    assert not optimizer.state_dict()["state"]
    assert [past.step for past in optimizer.run.transform(HistoryTransform).past] == [2, 3, 4] and optimizer.method.scalars == 6


def test_a_skipped_step_leaves_no_past():
    model = toys.classifier()
    optimizer = ZerothOrder(model, "replayed-momentum", lr=1e-3)
    optimizer.step(toys.loss_function(model), toys.batch())
    optimizer.step(lambda batch: toys.loss_function(model)(batch) * torch.nan, toys.batch())
    assert [past.step for past in optimizer.run.transform(HistoryTransform).past] == [0]
