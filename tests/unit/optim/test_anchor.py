"""``anchor_decay`` is θ ← θ − η (ĝ + λ (θ − θ₀)) for whatever is trained, and the same when it is resumed or replayed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods, replay
from zotune.optim.anchor import Anchor
from zotune.subspaces import LowRankCoordinate
from zotune.weights.computed_linear import ComputedLinear
from zotune.weights.quantized_linear import quantize

DECAY, RATE, EPS = 3.0, 1e-2, 1e-2


def lora() -> nn.Module:
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(toys.classifier(), peft.LoraConfig(r=2, target_modules=["1", "4"]))


CASES = {
    "full": (toys.classifier, methods.mezo(eps=EPS, num_directions=2)),
    "adapter": (lora, methods.mezo(eps=EPS, num_directions=2)),
    "low rank": (toys.classifier, methods.lozo(eps=EPS, interval=3, num_directions=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_step_is_the_plain_formula(case):
    """The weights that the model's state dict holds, between redraws too, against θ − η λ (θ − θ₀) − η ĝ in float64."""
    build, method = CASES[case]
    model = build()
    optimizer = ZerothOrder(model, method, lr=RATE, anchor_decay=DECAY)
    coordinates = optimizer.forward.coordinates
    began = {c.name: c.parameter.detach().double().clone() for c in coordinates}
    theta = {name: weight.clone() for name, weight in began.items()}
    for step in range(8):
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
        report = optimizer.last_report
        for c in coordinates:
            moves = [c.draw(optimizer.directions, 0, step, k, 1, alone=True)[0].double() for k in range(2)]
            if isinstance(c, LowRankCoordinate):
                moves = [u @ c.v.double().T / c.rank for u in moves]
            c.drop()
            estimate = sum(float(weight) * move for weight, move in zip(report.coefficients, moves, strict=True)) / 2
            theta[c.name] += -RATE * (estimate + DECAY * (theta[c.name] - began[c.name]))
        held = model.state_dict()
        assert all(torch.allclose(held[name].double(), weight, atol=1e-6) for name, weight in theta.items())
    far = torch.cat([(theta[name] - began[name]).view(-1) for name in theta]).norm()
    size = torch.cat([began[name].view(-1) for name in theta]).norm()
    drift = optimizer.drift()
    assert (drift.distance, drift.relative) == pytest.approx((float(far), float(far / size)), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mezo", "lozo", "mezo-adam", "sensitive-mezo", "replayed-momentum", "agzo"])
def test_resume_and_replay_are_bit_for_bit(name, dtype, tmp_path):
    def build(**options) -> tuple[nn.Module, ZerothOrder]:
        model = toys.classifier(dtype)
        method = toys.method(name, interval=3, eps=EPS)
        return model, ZerothOrder(model, method, lr=RATE, anchor_decay=DECAY, **options)

    def run(model: nn.Module, optimizer: ZerothOrder, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.step(toys.loss_function(model), toys.batch(seed=step))

    straight, optimizer = build(journal=tmp_path / "j")
    run(straight, optimizer, 0, 7)
    halted, first = build()
    run(halted, first, 0, 5)
    resumed, second = build()
    resumed.load_state_dict(copy.deepcopy(halted.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(resumed, second, 5, 7)
    rebuilt = toys.classifier(dtype)
    replayed = replay(rebuilt, tmp_path / "j", method=optimizer.method)
    for other in (resumed, rebuilt):
        assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), other.state_dict().values(), strict=True))
    assert optimizer.drift() == second.drift() == replayed.drift()


@pytest.mark.parametrize("name", ["mezo", "lozo", "mezo-adam", "replayed-momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_began_here_stay_where_nothing_moves_them(name, dtype):
    """Decay toward θ₀ of θ = θ₀ is exactly nothing, rounding included."""
    model = toys.classifier(dtype)
    before = copy.deepcopy(model.state_dict())
    optimizer = ZerothOrder(model, toys.method(name, interval=2, eps=EPS), lr=RATE, anchor_decay=DECAY)
    for _ in range(3):
        optimizer.step(lambda batch: torch.zeros(len(batch[0])), toys.batch(4))
    optimizer.flush_updates()
    assert all(torch.equal(a, before[key]) for key, a in model.state_dict().items()) and optimizer.drift().distance == 0.0


def test_of_weights_in_few_bits_only_what_was_added_shrinks():
    model = quantize(nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2, bias=False)), 8, skip=())
    model[0].bias.requires_grad_(False)
    began = [layer.dense() for layer in (model[0], model[2])]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    optimizer = ZerothOrder(model, methods.lozo(rank=1, interval=2, eps=EPS), lr=0.3, anchor_decay=1.0)
    for _ in range(3):
        optimizer.step(lambda x: model(x).square().mean(dim=1), x)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distance = optimizer.drift().distance
    optimizer.flush_updates()
    assert float(model[0].factor) == 1.0 and torch.allclose(kept["0.left"], model[0].left)
    added = [layer.dense() - weight for layer, weight in zip((model[0], model[2]), began, strict=True)]
    assert distance == pytest.approx(float(torch.cat([part.view(-1) for part in added]).norm()), rel=1e-4) and distance > 0
    layer = ComputedLinear(3, 4)
    layer.add(torch.ones(3, 1), torch.ones(4, 1), 1.0)
    layer.add(torch.zeros(3, 1), torch.ones(4, 1), 0.5, anchored=True)
    assert torch.equal(layer.left @ layer.right.T, torch.full((3, 4), 0.5))


def test_an_anchor_given_is_the_one_decayed_to_and_a_wrong_one_is_refused():
    base, model = toys.classifier(), toys.classifier()
    first = ZerothOrder(model, methods.mezo(eps=EPS), lr=RATE, anchor_decay=DECAY)
    first.step(toys.loss_function(model), toys.batch())
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    later = toys.classifier()
    later.load_state_dict(weights)
    with pytest.raises(ValueError, match="do not decay toward the same weights"):
        ZerothOrder(later, methods.mezo(eps=EPS), lr=RATE, anchor_decay=DECAY).load_state_dict(state)
    later = toys.classifier()
    later.load_state_dict(weights)
    second = ZerothOrder(later, methods.mezo(eps=EPS), lr=RATE, anchor_decay=DECAY, anchor=Anchor(base))
    second.load_state_dict(state)
    assert second.drift() == first.drift()


def test_an_adapter_resumes_toward_the_beginning_of_its_run(monkeypatch):
    monkeypatch.setattr("zotune.optim.anchor.SAVED", 1.0)  # this model is no larger than its adapter

    def built(seed: int) -> tuple[nn.Module, ZerothOrder]:
        model = lora()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        return model, ZerothOrder(model, methods.mezo(eps=EPS), lr=RATE, anchor_decay=DECAY)

    (halted, first), (resumed, second) = built(0), built(1)
    first.step(toys.loss_function(halted), toys.batch())
    resumed.load_state_dict(copy.deepcopy(halted.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((halted, first), (resumed, second)):
        optimizer.step(toys.loss_function(model), toys.batch(seed=1))
    assert first.drift() == second.drift()
    assert all(torch.equal(a, b) for a, b in zip(halted.state_dict().values(), resumed.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_decay": -1.0}, "the anchor_decay must be a number of at least 0"),
        ({"anchor_decay": 1.0, "weight_decay": 0.1}, "set one of them to 0"),
        ({"anchor": Anchor(nn.Linear(2, 2))}, "the anchor is not of this model: it has no 0.weight of 320 elements"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ZerothOrder(toys.classifier(), "mezo", **options)


def test_a_decay_set_later_is_refused_before_it_changes_a_weight():
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.mezo(eps=EPS), lr=RATE)
    assert optimizer.drift() is None
    optimizer.param_groups[0]["anchor_decay"] = 1.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="give anchor_decay when the optimizer is constructed"):
        optimizer.step(toys.loss_function(model), toys.batch())
    assert all(torch.equal(a, before[key]) for key, a in model.state_dict().items())


def test_an_anchor_in_the_models_own_file_is_not_copied(tmp_path):
    import transformers

    from zotune.training.stored_weights import StoredWeights

    toys.transformer("llama").save_pretrained(tmp_path)
    runs = []
    for stored in (True, False):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            model.model.norm.weight.add_(1.0)  # no longer that of the file
        anchor = Anchor(model, stored=StoredWeights(model) if stored else None)
        mapped = {name for name, _ in model.named_parameters()} - {"model.norm.weight"} if stored else set()
        assert anchor.mapped == mapped
        optimizer = ZerothOrder(model, methods.lozo(eps=EPS, interval=2), lr=1e-3, anchor_decay=DECAY, anchor=anchor)
        for _ in range(5):
            optimizer.step(toys.transformer_loss(model), toys.tokens())
        runs.append((model.state_dict(), optimizer))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].values(), runs[1][0].values(), strict=True))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while a run decays toward the weights in it"):
        runs[0][1].step(toys.transformer_loss(model), toys.tokens())
