"""``ZerothOrder`` as an engineer uses it in a loop of their own."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn

import toys
from zotune import NonFiniteLossError, ZerothOrder, methods
from zotune.rng.directions import Directions, Key


def gaussian(parameter: torch.Tensor, name: str, step: int = 0) -> torch.Tensor:
    return Directions("gaussian").draw(Key(0, step, 0, name), parameter.shape)


def test_a_mezo_step_is_its_equation():
    """θ ← θ − η (L(θ + εZ) − L(θ − εZ)) / 2ε · Z, worked out by hand."""
    model, x = toys.classifier(), toys.batch()
    hand = copy.deepcopy(model)
    eps, lr = 1e-2, 1e-1
    optimizer = ZerothOrder(model, methods.mezo(eps=eps), lr=lr)
    loss = optimizer.step(toys.loss_function(model), x)
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(hand)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(gaussian(parameter, name), alpha=sign * eps)
            sides.append(float(toys.loss_function(moved)(x).mean()))
    c = (sides[0] - sides[1]) / (2 * eps)
    assert float(optimizer.last_report.coefficients) == pytest.approx(c, rel=1e-4)
    assert float(loss) == pytest.approx(sum(sides) / 2, rel=1e-6) and optimizer.last_report.loss == float(loss)
    assert optimizer.last_report.loss_diff == pytest.approx(abs(sides[0] - sides[1]), rel=1e-4)
    for name, parameter in hand.named_parameters():
        expected = parameter - lr * c * gaussian(parameter, name)
        assert torch.allclose(dict(model.named_parameters())[name], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mezo", "lozo", "lozo-e"])
def test_micro_batches_are_the_batch(name):
    tokens, labels = toys.batch(16)
    whole, parts = toys.classifier(), toys.classifier()
    first, second = ZerothOrder(whole, name, lr=1e-3), ZerothOrder(parts, name, lr=1e-3)
    pieces = [(tokens[:4], labels[:4]), (tokens[4:10], labels[4:10]), (tokens[10:], labels[10:])]
    for _ in range(3):
        a = first.step(toys.loss_function(whole), (tokens, labels))
        b = second.step(toys.loss_function(parts), pieces)
        assert torch.allclose(a, b, atol=1e-6)
        assert torch.allclose(first.last_report.coefficients, second.last_report.coefficients, atol=1e-3)
        if not first.method.own:  # an example alone does not tell its noise
            assert first.last_report.loss_diff_stderr == pytest.approx(second.last_report.loss_diff_stderr, rel=1e-3)


def test_a_closure_and_a_scalar_loss_do():
    models = [toys.classifier() for _ in range(3)]
    x = toys.batch()
    optimizers = [ZerothOrder(model, "lozo", lr=1e-3) for model in models]
    losses = [
        optimizers[0].step(toys.loss_function(models[0]), x),
        optimizers[1].step(lambda: toys.loss_function(models[1])(x).mean()),
        optimizers[2].step(lambda batch: toys.loss_function(models[2])(batch).mean().item(), x),
    ]
    assert torch.allclose(torch.stack(losses), losses[0].expand(3))
    assert optimizers[1].last_report.loss_diff_stderr is None


def test_an_objective_without_a_gradient_is_as_good_as_any():
    """Accuracy itself: a step function."""
    model, x = toys.classifier(), toys.batch(64)
    optimizer = ZerothOrder(model, methods.mezo(eps=1e-1, num_directions=8), lr=1e-1)

    def errors(batch):
        return (model(batch[0]).argmax(-1) != batch[1]).float().mean(dim=1)

    losses = [float(optimizer.step(errors, x)) for _ in range(100)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_schedulers_of_torch_and_transformers_drive_the_rate():
    from transformers import get_scheduler

    model = toys.classifier()
    optimizer = ZerothOrder(model, "mezo", lr=1e-2)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    rates = []
    for _ in range(4):
        optimizer.step(toys.loss_function(model), toys.batch())
        rates.append(optimizer.last_report.lr[0])
        schedule.step()
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    optimizer.step(toys.loss_function(model), toys.batch())
    cosine.step()


def test_parameter_groups_have_their_own_rates_and_others_stay():
    model, x = toys.classifier(), toys.batch()
    before = copy.deepcopy(model)
    groups = [{"params": model[1].parameters(), "lr": 1e-2}, {"params": [model[4].bias], "lr": 0.0}]
    optimizer = ZerothOrder(model, "mezo", params=groups)
    optimizer.step(toys.loss_function(model), x)
    assert not torch.equal(model[1].weight, before[1].weight)
    assert torch.equal(model[4].bias, before[4].bias) and torch.equal(model[0].weight, before[0].weight)
    change = model[1].weight - before[1].weight
    expected = -1e-2 * float(optimizer.last_report.coefficients) * gaussian(change, "1.weight")
    assert torch.allclose(change, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["mezo", "lozo"])
def test_weight_decay_shrinks_matrices_and_spares_bias_and_norm(name):
    model = toys.classifier()
    before = copy.deepcopy(model)
    options = {"interval": 5} if name == "lozo" else {}
    optimizer = ZerothOrder(model, methods.get(name, **options), lr=1e-2, weight_decay=0.5)
    for _ in range(10):
        optimizer.step(lambda batch: torch.ones(len(batch)), toys.batch()[0])  # a flat loss: nothing but decay
    optimizer.remove_hooks()
    for key, parameter in before.named_parameters():
        factor = (1 - 1e-2 * 0.5) ** 10 if parameter.dim() > 1 else 1.0
        assert torch.allclose(dict(model.named_parameters())[key], factor * parameter, rtol=1e-5), key


def test_frozen_parameters_do_not_move_and_adapters_alone_do():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(toys.transformer("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = toys.tokens()
    optimizer = ZerothOrder(model, methods.mezo(eps=1e-2), lr=1e-3)
    for _ in range(3):
        optimizer.step(toys.transformer_loss(model), ids)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and all("lora_" in name for name in moved)


def test_low_rank_over_lora_adapters_keeps_its_side_paths():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(toys.transformer("llama"), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = ZerothOrder(model, methods.lozo(rank=2, eps=1e-2), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(toys.transformer_loss(model), toys.tokens())
    assert len(optimizer.forward.low_rank_hooks) == 8


@pytest.mark.parametrize("name", toys.ARCHITECTURES)
@pytest.mark.parametrize("method", ["mezo", "lozo"])
def test_architectures_learn(name, method):
    model = toys.transformer(name)
    ids = toys.tokens(size=8)
    optimizer = ZerothOrder(model, methods.get(method, num_directions=4), lr=3e-4)
    losses = [float(optimizer.step(toys.transformer_loss(model), ids)) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_module_used_twice_and_a_grouped_convolution_move_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.grouped = nn.Conv1d(6, 6, 1, groups=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.grouped(self.inner(self.inner(x)).unsqueeze(-1)).squeeze(-1)

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(8, 6)
    optimizer = ZerothOrder(model, methods.lozo(rank=2, interval=3, num_directions=4), lr=1e-2)
    losses = [float(optimizer.step(lambda x: (model(x) - x).square().mean(dim=1), x)) for _ in range(60)]
    assert losses[-1] < losses[0]
    assert [path.coordinate.name for path in optimizer.forward.low_rank_hooks] == ["inner.weight"]


def test_the_state_is_tensors_and_json():
    model = toys.classifier(torch.bfloat16)
    optimizer = ZerothOrder(model, "lozo-m", lr=1e-2)
    optimizer.step(toys.loss_function(model), toys.batch())
    state = optimizer.state_dict()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state["state"].values())
    json.dumps([state["param_groups"], state["zotune"], optimizer.header()])


def test_nan_in_a_row_stops_with_the_step_named():
    model = toys.classifier()
    optimizer = ZerothOrder(model, "mezo", lr=1e-3, max_nonfinite_steps=3)
    optimizer.step(toys.loss_function(model), toys.batch())
    before = copy.deepcopy(model.state_dict())

    def broken(batch):
        return toys.loss_function(model)(batch) * math.inf

    optimizer.step(broken, toys.batch())
    optimizer.step(broken, toys.batch())
    with pytest.raises(NonFiniteLossError, match="3 steps in a row, the last being step 3"):
        optimizer.step(broken, toys.batch())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_one_direction_of_several_may_be_skipped():
    model, calls = toys.classifier(), []

    def sometimes(batch):
        calls.append(1)
        return toys.loss_function(model)(batch) * (math.nan if len(calls) == 3 else 1.0)

    optimizer = ZerothOrder(model, methods.mezo(num_directions=3), lr=1e-3, forward_batching="sequential")
    before = copy.deepcopy(model.state_dict())
    optimizer.step(sometimes, toys.batch())
    assert optimizer.last_report.skipped == (False, True, False) and math.isfinite(optimizer.last_report.loss)
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def other_model() -> nn.Module:
    return nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ZerothOrder(m, "mezzo"), "did you mean 'mezo'"),
        (lambda m: ZerothOrder(m, "mezo", lr=-1.0), "learning rate must be a number of at least 0"),
        (lambda m: ZerothOrder(m, "mezo", lr=math.nan), "learning rate must be a number"),
        (lambda m: ZerothOrder(m, "mezo", weight_decay=-1.0), "weight_decay must be"),
        (lambda m: ZerothOrder(m, "mezo", max_nonfinite_steps=0), "max_nonfinite_steps must be at least 1"),
        (lambda m: ZerothOrder(m.requires_grad_(False), "mezo"), "no trainable parameter"),
        (lambda m: ZerothOrder(m, "mezo", params=other_model().parameters()), "not one of the model's own"),
        (lambda m: [ZerothOrder(m, "lozo"), ZerothOrder(m, "lozo")], "already trained by another ZerothOrder"),
        (lambda m: ZerothOrder(m, "mezo").step(3), "needs a function that returns the loss"),
        (lambda m: ZerothOrder(m, "mezo").step(print, closure=print), "needs a function that returns the loss"),
        (lambda m: ZerothOrder(m, "mezo").step(toys.loss_function(m), []), "empty list of micro-batches"),
        (lambda m: ZerothOrder(m, "mezo").step(lambda b: m(b[0]), toys.batch()), "returned shape"),
        (lambda m: ZerothOrder(m, "mezo").load_state_dict({"state": {}, "param_groups": []}), "not the state of a ZerothOrder"),
        (lambda m: ZerothOrder(m, "mezo").load_state_dict({"zotune": {"version": 1}}), "saved by another version of zotune"),
        (lambda m: ZerothOrder(m, "mezo", seed=1).load_state_dict(ZerothOrder(m, "mezo").state_dict()), "has seed 0"),
        (lambda m: ZerothOrder(m, "mezo").load_state_dict(ZerothOrder(m, "mezo-adam").state_dict()), "has method 'mezo-adam'"),
        (
            lambda m: ZerothOrder(m, "mezo").load_state_dict(ZerothOrder(m, methods.mezo(eps=1e-2)).state_dict()),
            "the saved run has options",
        ),
        (lambda m: ZerothOrder(m, methods.mezo(update_rule="Rprop"), weight_decay=0.1), "has no weight decay"),
    ],
)
def test_misuse_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(toys.classifier())


def test_a_detached_model_may_be_trained_again():
    model = toys.classifier()
    ZerothOrder(model, "lozo").remove_hooks()
    ZerothOrder(model, "lozo").step(toys.loss_function(model), toys.batch())


def test_a_deep_copy_of_a_model_in_training_computes_alone():
    model, x = toys.classifier(), toys.batch()
    optimizer = ZerothOrder(model, "lozo", lr=1e-1)
    optimizer.step(toys.loss_function(model), x)
    twin = copy.deepcopy(model)
    there = twin(x[0])
    assert torch.equal(there, model(x[0]))
    optimizer.step(toys.loss_function(model), x)
    assert torch.equal(there, twin(x[0])) and not torch.equal(there, model(x[0]))
