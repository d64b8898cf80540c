"""Any torch optimizer is a rule, and does to the coordinates what it does to weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods
from zotune.methods.rules import EMASGD, FIRST_MOMENTS, OWN_RULES, PartialOrthogonal, Rule, resolve
from zotune.rng.directions import Directions, Key
from zotune.subspaces import Coordinate

RULES = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {"betas": (0.8, 0.9)}),
    ("RMSprop", {}),
    ("Adagrad", {}),
    ("EMASGD", {"beta": 0.7}),
    ("Lion", {}),
    ("Prodigy", {}),
]


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_a_rule_does_what_its_optimizer_does_with_its_estimates(rule, options):
    if rule in ("Lion", "Prodigy"):
        pytest.importorskip("pytorch_optimizer")
    model, x = toys.classifier(), toys.batch()
    reference = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.mezo(update_rule=rule, update_rule_args=options), lr=1e-2)
    each = [resolve(rule)([p], lr=1e-2, **options) for p in reference.parameters()]
    directions = Directions("gaussian")
    for step in range(5):
        optimizer.step(toys.loss_function(model), x)
        c = float(optimizer.last_report.coefficients[0])
        for name, parameter in reference.named_parameters():
            parameter.grad = c * directions.draw(Key(0, step, 0, name), parameter.shape)
        for expected in each:
            expected.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_plain_descent_is_torchs_bit_for_bit():
    rule, draw = Rule("SGD", {}), torch.Generator().manual_seed(0)
    value, estimate = torch.randn(7, 5, generator=draw), torch.randn(7, 5, generator=draw)
    for decay in (0.0, 0.1):
        parameter = nn.Parameter(value.clone())
        parameter.grad = estimate.clone()
        torch.optim.SGD([parameter], lr=0.03, weight_decay=decay).step()
        assert torch.equal(rule.update("w", value.clone(), estimate.clone(), 0.03, decay), parameter.detach())


def trained(rule: str, cut: int | None = None, steps: int = 7) -> nn.Module:
    """The toy after some steps of a rule, in one run, or in two with state dicts between them."""
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.mezo(update_rule=rule), lr=1e-3)
    for step in range(steps):
        if step == cut:
            weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            json.dumps(state["zotune"])
            model = toys.classifier()
            model.load_state_dict(weights)
            optimizer = ZerothOrder(model, methods.mezo(update_rule=rule), lr=1e-3)
            optimizer.load_state_dict(state)
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
    return model


TORCH = [n for n, v in vars(torch.optim).items() if isinstance(v, type) and n not in ("Optimizer", "LBFGS", "SparseAdam")]


@pytest.mark.parametrize("rule", [*OWN_RULES, *TORCH, "Lion", "AdamP", "Prodigy", "Adan", "SpectralSphere"])
def test_any_class_that_is_let_in_resumes_bit_for_bit(rule):
    if rule not in OWN_RULES and rule not in TORCH:
        pytest.importorskip("pytorch_optimizer")
    straight, halves = trained(rule), trained(rule, cut=4)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), halves.state_dict().values(), strict=True))
    assert not torch.equal(straight[1].weight, toys.classifier()[1].weight)


def test_a_rule_for_matrices_leaves_vectors_to_adamw_at_its_rate():
    model = toys.classifier()
    before = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.mezo(update_rule="Muon"), lr=1e-2)
    assert optimizer.rule.matrices_only
    optimizer.step(toys.loss_function(model), toys.batch())
    c = float(optimizer.last_report.coefficients[0])
    for name, parameter in before.named_parameters():
        cls, options = (torch.optim.Muon, {"weight_decay": 0.0}) if parameter.dim() == 2 else (torch.optim.AdamW, {"weight_decay": 0.0})
        parameter.grad = c * Directions("gaussian").draw(Key(0, 0, 0, name), parameter.shape)
        cls([parameter], lr=1e-2, **options).step()
        assert torch.allclose(dict(model.named_parameters())[name], parameter, atol=1e-6), name


@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_r_adazo_is_its_equation(beta2):
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = resolve("RAdaZO")([p], lr=0.5, betas=(0.75, beta2), zeta=1e-6)
    m = v = 0.0
    value = 1.0
    for grad in (1.0, -3.0, 2.0):
        p.grad = torch.tensor([grad])
        optimizer.step()
        m = 0.75 * m + 0.25 * grad
        v = beta2 * v + (1 - beta2) * m * m
        value -= 0.5 * m / (v + 1e-6) ** 0.5
    assert float(p.detach()) == pytest.approx(value, rel=1e-5)


def test_sign_moves_every_number_by_the_rate_after_its_decay():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = resolve("Sign")([p], lr=0.5, weight_decay=0.1)
    p.grad = torch.tensor([1e-9, -5.0, 0.0])
    optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([0.95 - 0.5, -1.9 + 0.5, 2.85]))


def test_a_class_is_as_good_as_a_name():
    assert resolve(torch.optim.Adam) is resolve("adam") is torch.optim.Adam


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_partial_orthogonal_is_its_equation(shape, beta):
    """Of a matrix and a random M: two columns by warm power iteration; a constant M of all columns ends at its polar factor."""
    generator = torch.Generator().manual_seed(0)
    value, optimizer = torch.zeros(6, 4), PartialOrthogonal([p := nn.Parameter(torch.zeros(shape))], lr=0.5, share=0.5, beta=beta)
    average = v = None
    for _ in range(4):
        tall = torch.randn(6, 4, generator=generator)
        p.grad = tall if shape == (6, 4) else tall.T.contiguous()
        optimizer.step()
        average = tall if average is None else beta * average + (1 - beta) * tall
        v, _ = torch.linalg.qr(average @ average.T @ (average[:, :2] if v is None else v))
        u = average.T @ v
        value -= 0.5 * v @ (u / u.norm(dim=0)).T
        assert torch.allclose(p.detach() if shape == (6, 4) else p.detach().T, value, atol=1e-5)
    left, _, right = torch.linalg.svd(tall, full_matrices=False)
    optimizer = PartialOrthogonal([p := nn.Parameter(torch.zeros(6, 4))], lr=1.0, share=1.0)
    for _ in range(200):
        before, p.grad = p.detach().clone(), tall
        optimizer.step()
    assert torch.allclose(before - p.detach(), left @ right, atol=1e-4)


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
    rule.transport("w", lambda moment: moment @ t)
    after, _ = rule.state()
    assert FIRST_MOMENTS[0] == "exp_avg"
    assert torch.allclose(after["w/exp_avg"], before["w/exp_avg"] @ t)
    assert torch.equal(after["w/exp_avg_sq"], before["w/exp_avg_sq"])


@pytest.mark.parametrize("rule", ["Adam", "AdamW", "SGD"])
def test_weight_decay_is_the_optimizers_and_spares_vectors(rule):
    model, x = toys.classifier(), toys.batch()
    reference = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.mezo(update_rule=rule), lr=1e-2, weight_decay=0.3)
    optimizer.step(toys.loss_function(model), x)
    groups = [
        {"params": [p for p in reference.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in reference.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    expected = resolve(rule)(groups, lr=1e-2)
    for name, parameter in reference.named_parameters():
        z = Directions("gaussian").draw(Key(0, 0, 0, name), parameter.shape)
        parameter.grad = float(optimizer.last_report.coefficients[0]) * z
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
        ("LBFGS", {}, "LBFGS cannot be an update rule here: a step on an estimate alone fails"),
        ("SparseAdam", {}, "SparseAdam cannot be an update rule here: a step on an estimate alone fails"),
        ("ScheduleFreeAdamW", {}, "it trains other weights than it evaluates"),
        ("SOAP", {}, "it keeps a state that cannot be saved and restored exactly"),
        ("AdamMini", {}, "it does not take a list of parameters"),
        ("AdaHessian", {}, "a step on an estimate alone fails"),
    ],
)
def test_bad_rules_are_refused(rule, options, message):
    if rule in ("ScheduleFreeAdamW", "SOAP", "AdamMini", "AdaHessian"):
        pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match=message):
        methods.mezo(update_rule=rule, update_rule_args=options)
