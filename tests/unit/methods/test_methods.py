"""Facts of single methods; what every method has in common is in test_every_method."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from zotune import ZerothOrder, methods
from zotune.optim.journal_records import StepRecord
from zotune.rng.directions import Directions, Key


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("num_directions", [1, 3])
def test_lozo_updates_along_its_perturbed_direction_every_step(rank, num_directions):
    """ΔW = −η (1/K) Σ c_k U_k Vᵀ / r with the U_k and V of the evaluation, redraw steps included."""
    model = nn.Linear(6, 5, bias=False)
    seen: list[torch.Tensor] = []

    def loss(x):
        seen.append(model(torch.eye(6)).T.clone())  # the weights this evaluation computed with
        return model(x).square().mean(dim=1)

    eps, lr, x = 1e-1, 1e-2, torch.ones(4, 6)
    optimizer = ZerothOrder(
        model, methods.lozo(rank=rank, interval=4, eps=eps, num_directions=num_directions), lr=lr, forward_batching="sequential"
    )
    optimizer.step(loss, x)
    for _ in range(1, 14):
        before = model.state_dict()["weight"].clone()
        seen.clear()
        optimizer.step(loss, x)
        change = model.state_dict()["weight"] - before
        expected = torch.zeros_like(change)
        for k, c in enumerate(optimizer.last_report.coefficients.tolist()):
            direction = (seen[2 * k] - seen[2 * k + 1]) / (2 * eps)  # U_k Vᵀ as it was evaluated
            assert torch.linalg.matrix_rank(direction, rtol=1e-4) <= rank
            expected -= lr * c / num_directions * direction / rank
        assert torch.allclose(change, expected, atol=2e-6)


def test_lozo_m_transports_its_momentum_at_a_redraw():
    """N ← N V_oldᵀ V_new / n at the redraw, then N ← βN + (1 − β) c U."""
    model = nn.Linear(6, 5, bias=False)
    optimizer = ZerothOrder(model, methods.lozo_m(rank=2, interval=3, momentum=0.9), lr=1e-2)
    coordinate = optimizer.forward.coordinates[0]

    def loss(x):
        return model(x).square().mean(dim=1)

    for _ in range(3):
        optimizer.step(loss, torch.ones(4, 6))
    old, v_old = optimizer.rule.state()[0]["weight/exp_avg"].clone(), coordinate.v.clone()
    optimizer.step(loss, torch.ones(4, 6))
    assert not torch.equal(coordinate.v, v_old)
    u = Directions("gaussian").draw(Key(0, 3, 0, "weight"), (5, 2))
    expected = 0.9 * old @ v_old.T @ coordinate.v / 6 + 0.1 * float(optimizer.last_report.coefficients) * u
    assert torch.allclose(optimizer.rule.state()[0]["weight/exp_avg"], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["mezo", "lozo", "lozo-m"])
def test_1000_bfloat16_steps_at_rate_zero_change_no_weight(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    before = copy.deepcopy(model)
    optimizer = ZerothOrder(model, methods.get(name), lr=0.0)
    for _ in range(1000):
        optimizer.step(lambda x: model(x).float().mean(dim=1), torch.ones(2, 8, dtype=torch.bfloat16))
    optimizer.remove_hooks()
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), before.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["mezo", "lozo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_200_updates_far_below_the_spacing_add_up(name, dtype):
    """Updates of 1e-6 z on weights of size 0.02: their sum is kept with cosine ≥ 0.99 (rounding in place keeps 0.15)."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.normal_(model.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    model.to(dtype)
    interval = {"interval": 1000} if name == "lozo" else {}
    optimizer = ZerothOrder(model, methods.get(name, **interval), lr=1e-6)
    coordinate = optimizer.forward.coordinates[0]
    truth = torch.zeros(coordinate.shape)
    for step in range(200):
        optimizer.apply(StepRecord(step, (1e-6,), 0.0, (1.0,), (False,)))
        truth -= 1e-6 * coordinate.lr_scale * Directions("gaussian").draw(Key(0, step, 0, "weight"), coordinate.shape)
    start = nn.Linear(64, 64, bias=False)
    nn.init.normal_(start.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    kept = coordinate.value().detach() - (start.weight.detach().to(dtype).float() if name == "mezo" else 0)
    assert float(torch.nn.functional.cosine_similarity(kept.flatten(), truth.flatten(), dim=0)) > 0.999


def test_without_a_residual_those_updates_are_lost():
    """The test above can fail: the same updates added in place to bfloat16 weights keep a cosine below 0.5."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(64, 64, generator=generator)).bfloat16()
    start, truth = weight.float(), torch.zeros(64, 64)
    for _ in range(200):
        z = torch.randn(64, 64, generator=generator)
        weight += (1e-6 * z).bfloat16()
        truth += 1e-6 * z
    kept = weight.float() - start
    assert float(torch.nn.functional.cosine_similarity(kept.flatten(), truth.flatten(), dim=0)) < 0.5


ALONE = """
import importlib, pkgutil, sys, tempfile

others = "transformers tokenizers peft accelerate datasets huggingface_hub safetensors yaml rich matplotlib"

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others.split():
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
import zotune

for package in "rng weights subspaces methods forward optim".split():
    module = importlib.import_module("zotune." + package)
    for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
        importlib.import_module(found.name)

def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).requires_grad_()

torch.manual_seed(0)
trained, base = model(), model()
base.load_state_dict(trained.state_dict())
before = trained[0].weight.clone()
journal = tempfile.mkdtemp() + "/journal.zo"
optimizer = zotune.ZerothOrder(trained, zotune.methods.default(), lr=1e-2, journal=journal)
for _ in range(2):
    optimizer.step(lambda batch: trained(batch).square().mean(dim=1), torch.ones(8, 4))
zotune.replay(base, journal)
assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), base.state_dict().values()))
assert not torch.equal(trained.state_dict()["0.weight"], before)
"""


def test_the_core_trains_and_replays_with_torch_alone():
    """Law 7."""
    done = subprocess.run([sys.executable, "-c", ALONE], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.get("lozzo"), "unknown method 'lozzo'; did you mean 'lozo'"),
        (lambda: methods.get("lozo", rnak=3), "has no option 'rnak'; did you mean 'rank'"),
        (lambda: methods.get("mezo", rank=3), "method 'mezo' has no option 'rank'"),
        (lambda: methods.lozo(rank=0), "rank must be a whole number of at least 1"),
        (lambda: methods.mezo(eps=0.0), "eps must be a positive number"),
        (lambda: methods.mezo(num_directions=0), "num_directions must be"),
        (lambda: methods.mezo(direction="gausian"), "did you mean 'gaussian'"),
        (lambda: methods.mezo(estimator="middle"), "unknown estimator 'middle'"),
        (lambda: methods.lozo(fitness="rank"), "unknown fitness 'rank'; did you mean 'ranks'"),
        (lambda: methods.lozo_e(fitness="ranks"), "lozo-e does not have as it is: set directions_per to 'batch'"),
        (lambda: dataclasses.replace(methods.meazo(), fitness="ranks"), "meazo needs the differences of the losses themselves"),
    ],
)
def test_bad_options_get_one_sentence_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


#: Another value of options that are texts; of others it follows from the default.
OTHER = {
    "direction": ("rademacher", "gaussian"), "estimator": ("forward", "central"), "update_rule": ("RMSprop",), "choice": ("column",),
    "directions_per": ("example", "batch"), "rounding": ("residual",), "update_rule_args": ({"alpha": 0.5},),
    "unit": ("linear",), "fitness": ("ranks", "z-score"), "layers": ("magnitude",),
    "kernel": ("linear",), "angle": (1.0,), "projected": ("matrices",), "prior": (2.0,), "noise": (2.0,),
}  # fmt: skip


def another(name: str, default: object) -> list[object]:
    if name in OTHER:
        return [value for value in OTHER[name] if value != default]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 1]
    if isinstance(default, float):
        return [default / 2 or 0.5]
    assert isinstance(default, tuple), f"what would be another value of {name}={default!r}?"
    return [tuple(value / 2 for value in default)]


@pytest.mark.parametrize("name", methods.names())
def test_every_option_of_a_recipe_changes_its_method(name):
    """Each option is in the method, or its other value is refused; none is dropped."""
    for option, default in methods.options_of(name).items():
        beside = {"update_rule": "RMSprop"} if option == "update_rule_args" else {}
        grouped = {"directions_per": "group"} if option == "group_size" else {}
        for value in another(option, default):
            try:
                changed = methods.get(name, **beside, **grouped, **{option: value})
            except ValueError:
                continue
            assert changed != methods.get(name, **beside), option
