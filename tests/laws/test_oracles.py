"""Numbers of an independent implementation, torchzero, given the same directions: estimators and rules take the same steps."""

from __future__ import annotations

import copy

import pytest
import torch

import toys
from zotune import ZerothOrder, methods
from zotune.methods.rules import resolve
from zotune.rng.directions import Directions, Key

tz = pytest.importorskip("torchzero", reason="pip install 'zotune[oracles]'", exc_type=ImportError)

EPS, LR = 1e-2, 1e-2
CASES = {
    "mezo": ({}, "central", list),
    "mezo-forward": ({"estimator": "forward", "direction": "rademacher"}, "forward", list),
    "mezo-momentum": ({}, "central", lambda: [tz.m.HeavyBall(0.9, ema_init="zeros")]),
    "mezo-adam": ({}, "central", lambda: [tz.m.Adam(0.9, 0.999)]),
    "zo-sgd-sign": ({}, "central", lambda: [tz.m.Sign()]),
}


@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_torchzeros_along_the_same_directions(case, num_directions):
    options, formula, rule = CASES[case]
    method = methods.get(case.removesuffix("-forward"), eps=EPS, num_directions=num_directions, **options)
    ours, theirs = toys.classifier(), toys.classifier()
    optimizer = ZerothOrder(ours, method, lr=LR, forward_batching="sequential")
    names = {id(p): name for name, p in theirs.named_parameters()}

    class Given(tz.m.RandomizedFDM):
        def pre_step(self, objective):
            for p in objective.params:
                keys = [Key(0, optimizer.steps, k, names[id(p)]) for k in range(num_directions)]
                self.state[p]["perturbations"] = [EPS * Directions(method.direction).draw(key, p.shape) for key in keys]

    oracle = tz.Optimizer(theirs.parameters(), Given(h=EPS, formula=formula, n_samples=num_directions), *rule(), tz.m.LR(LR))
    begin = copy.deepcopy(ours)
    for step in range(6):
        x = toys.batch(seed=step)
        oracle.step(lambda backward=True, x=x: toys.loss_function(theirs)(x).mean())
        optimizer.step(toys.loss_function(ours), x)
    for a, b, start in zip(ours.parameters(), theirs.parameters(), begin.parameters(), strict=True):
        assert not torch.allclose(a, start, atol=1e-3)
        assert torch.allclose(a, b, atol=2e-4)


def test_the_sign_is_that_of_pytorch_optimizer():
    package = pytest.importorskip("pytorch_optimizer")
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    for estimate in torch.randn(4, 7, generator=torch.Generator().manual_seed(0)):
        for parameter in (p, q):
            parameter.grad = estimate.clone()
    ours, theirs = resolve("Sign")([p], lr=0.1), package.SignSGD([q], lr=0.1, momentum=0.0)
    for _ in range(3):
        ours.step()
        theirs.step()
    assert torch.equal(p, q)
