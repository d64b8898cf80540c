"""Any torch optimiser is a rule, and does to the coordinates what it does to weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods
from zotune.directions import Directions, Key
from zotune.rules import EMASGD, FIRST_MOMENTS, Rule, resolve
from zotune.subspaces import Coordinate

RULES = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {"betas": (0.8, 0.9)}),
    ("RMSprop", {}),
    ("Adagrad", {}),
    ("EMASGD", {"beta": 0.7}),
    ("Lion", {}),
]


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_a_rule_does_what_its_optimizer_does_with_the_same_estimates(rule, options):
    if rule == "Lion":
        pytest.importorskip("pytorch_optimizer")
    model, x = toys.classifier(), toys.batch()
    reference = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.mezo(rule=rule, rule_args=options), lr=1e-2)
    expected = resolve(rule)(reference.parameters(), lr=1e-2, **options)
    directions = Directions("gaussian")
    for step in range(5):
        optimizer.step(toys.loss_function(model), x)
        c = float(optimizer.last.coefficients[0])
        for name, parameter in reference.named_parameters():
            parameter.grad = c * directions.draw(Key(0, step, 0, name), parameter.shape)
        expected.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_class_is_as_good_as_a_name():
    assert resolve(torch.optim.Adam) is resolve("adam") is torch.optim.Adam


def test_ema_sgd_is_its_equation():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = EMASGD([p], lr=0.5, beta=0.75)
    average = value = 0.0
    for grad in (1.0, 2.0):
        p.grad = torch.tensor([grad])
        optimizer.step()
        average = 0.75 * average + 0.25 * grad
        value -= 0.5 * average
    assert float(p.detach()) == pytest.approx(1 + value)


@pytest.mark.parametrize("name", ["mezo-adam", "mezo-momentum", "mezo"])
def test_no_more_than_one_estimate_is_alive_at_a_time(name, monkeypatch):
    alive, most = [], [0]
    original = Coordinate.weighted

    def tracked(self, *args, **kwargs):
        import weakref

        out = original(self, *args, **kwargs)
        alive.append(weakref.ref(out.untyped_storage()))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return out

    monkeypatch.setattr(Coordinate, "weighted", tracked)
    model = toys.classifier()
    optimizer = ZerothOrder(model, name, lr=1e-3)
    optimizer.step(toys.loss_function(model), toys.batch())
    for _, parameter in model.named_parameters():
        assert parameter.grad is None
    assert most[0] == (0 if name == "mezo" else 1)  # plain SGD builds none at all


def test_first_moments_follow_a_change_of_basis():
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(2, 2, generator=generator)
    rule = Rule("Adam", {})
    estimate = torch.randn(4, 2, generator=generator)
    rule.update("w", torch.zeros(4, 2), estimate, 1e-3, 0.0)
    tensors, _ = rule.state()
    before = {k: v.clone() for k, v in tensors.items()}
    rule.transport("w", t)
    after, _ = rule.state()
    assert FIRST_MOMENTS[0] == "exp_avg"
    assert torch.allclose(after["w/exp_avg"], before["w/exp_avg"] @ t)
    assert torch.equal(after["w/exp_avg_sq"], before["w/exp_avg_sq"])


@pytest.mark.parametrize("rule", ["Adam", "AdamW", "SGD"])
def test_weight_decay_means_what_it_means_to_the_optimizer_and_spares_vectors(rule):
    model, x = toys.classifier(), toys.batch()
    reference = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.mezo(rule=rule), lr=1e-2, weight_decay=0.3)
    optimizer.step(toys.loss_function(model), x)
    groups = [
        {"params": [p for p in reference.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in reference.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    expected = resolve(rule)(groups, lr=1e-2)
    for name, parameter in reference.named_parameters():
        z = Directions("gaussian").draw(Key(0, 0, 0, name), parameter.shape)
        parameter.grad = float(optimizer.last.coefficients[0]) * z
    expected.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("AdamW", {"weight_decay": 0.1}, "give weight_decay to the optimizer"),
        ("Adam", {"lr": 0.1}, "give lr to the optimizer"),
        ("Adamm", {}, "did you mean 'Adam'"),
        ("Adam", {"beta": 0.9}, "does not take the options"),
        (nn.Linear, {}, "must be a torch.optim.Optimizer class"),
    ],
)
def test_bad_rules_are_refused(rule, options, message):
    with pytest.raises(ValueError, match=message):
        methods.mezo(rule=rule, rule_args=options)
