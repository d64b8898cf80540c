"""Hybrid ZO-FO: each part moves as its own method would, and nothing is kept of the forward before the last blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toys
from zotune import ZerothOrder, baselines, methods
from zotune.baselines import FirstOrder, Hybrid
from zotune.subspaces.coordinate import Offset


def hybrid(model: nn.Module, lr: float, zo_lr: float, weight_decay: float = 0.0, **options) -> Hybrid:
    return Hybrid(model, baselines.hybrid(zo_lr=zo_lr, **options), lr=lr, weight_decay=weight_decay)


def steps(optimizer: Hybrid | ZerothOrder, count: int = 5) -> list[float]:
    loss = toys.loss_function(optimizer.model)
    return [float(optimizer.step(loss, toys.batch(seed=step))) for step in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_before_the_last_blocks_it_is_mezo_bit_for_bit(dtype: torch.dtype) -> None:
    model, other = toys.classifier(dtype), toys.classifier(dtype)
    steps(hybrid(model, lr=0.0, zo_lr=1e-2, weight_decay=0.1))
    names = [name for name, _ in other.named_parameters()]
    assert names[-2:] == ["4.weight", "4.bias"]
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(not name.startswith("4."))
    mezo = ZerothOrder(other, methods.mezo(eps=1e-3), lr=1e-2, weight_decay=0.1, forward_batching="sequential")
    steps(mezo)
    mezo.remove_hooks()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not torch.equal(model[0].weight, toys.classifier(dtype)[0].weight)


def test_last_blocks_step_along_the_mean_gradient_of_both_points() -> None:
    model = toys.classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = hybrid(model, lr=0.5, zo_lr=0.0, update_rule="SGD", eps=0.1)
    coordinates, directions = optimizer.shallow.forward.coordinates, optimizer.shallow.directions
    found = {name: torch.zeros_like(before[name]) for name in ("4.weight", "4.bias")}
    for sign in (+1, -1):
        moved = toys.classifier()
        parameters = dict(moved.named_parameters())
        for coordinate in coordinates:
            parameters[coordinate.name].data.copy_(coordinate.at(directions, Offset(sign * 0.1, 0, 0, 0)))
        toys.loss_function(moved)(toys.batch()).mean().backward()
        for name, total in found.items():
            total.add_(parameters[name].grad, alpha=0.5)
    optimizer.step(toys.loss_function(model), toys.batch())
    for name, parameter in model.named_parameters():
        expected = before[name] - 0.5 * found[name] if name in found else before[name]
        assert torch.allclose(parameter, expected, atol=1e-6), name


def kept_for_backward(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes of activations that autograd keeps in a step: of what it saves, all that is no parameter."""
    total, own = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size() if tensor.untyped_storage().data_ptr() not in own else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return total


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_activations_before_the_last_blocks_are_not_kept(name: str) -> None:
    """What is kept is the same in a model of 2 layers and in one of 5; backprop through all keeps more with every layer."""
    kept: dict[type, list[int]] = {Hybrid: [], FirstOrder: []}
    for layers in (2, 5):
        for kind, method in ((Hybrid, "hybrid"), (FirstOrder, "fo-sgd")):
            model = toys.transformer(name, num_hidden_layers=layers)
            optimizer, loss = kind(model, method), toys.transformer_loss(model)
            kept[kind].append(kept_for_backward(model, lambda o=optimizer, f=loss: o.step(f, toys.tokens())))
    assert 0 < kept[Hybrid][0] == kept[Hybrid][1]
    assert kept[FirstOrder][1] > 2 * kept[FirstOrder][0]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bert"])
def test_the_last_blocks_are_those_and_a_head_of_its_own(name: str) -> None:
    model = toys.transformer(name, **({"tie_word_embeddings": False} if name == "llama" else {}))
    layers = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}[name]
    deep = Hybrid(model, "hybrid").parameters
    in_last = {key for key, _ in model.named_parameters() if key.startswith(f"{layers}.1.")}
    assert set(deep) == in_last | ({"lm_head.weight"} if name == "llama" else set())


def test_a_step_that_raises_or_is_not_finite_moves_nothing() -> None:
    model = toys.classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = hybrid(model, lr=0.1, zo_lr=0.1)

    def failing(batch: object) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing, toys.batch())
    calls = iter((1.0, torch.inf))  # the second point alone
    optimizer.step(lambda batch: toys.loss_function(model)(batch) * next(calls), toys.batch())
    assert optimizer.last_report is not None and optimizer.last_report.skipped == (True,)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert steps(optimizer, 2) and not torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_a_scheduler_scales_both_rates() -> None:
    optimizer = hybrid(toys.classifier(), lr=1e-2, zo_lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 2)
    steps(optimizer, 1)
    schedule.step()
    schedule.step()
    steps(optimizer, 1)
    assert optimizer.last_report is not None and optimizer.last_report.lr == pytest.approx((5e-3, 5e-3, 5e-4))


@pytest.mark.parametrize(
    ("trainable", "blocks", "message"),
    [
        ("layers.1.", 1, "nothing is trained before the last blocks"),
        ("embed_tokens", 1, "nothing is trained in the last blocks"),
        ("", 2, "the model has 2 blocks"),
        ("nothing", 1, "no trainable parameter"),
    ],
)
def test_a_model_that_has_only_one_of_the_parts_is_refused(trainable: str, blocks: int, message: str) -> None:
    model = toys.transformer("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    with pytest.raises(ValueError, match=message):
        Hybrid(model, baselines.hybrid(blocks=blocks))


def test_plain_backprop_does_not_pass_for_it() -> None:
    with pytest.raises(ValueError, match=r"step with zotune\.baselines\.Hybrid"):
        FirstOrder(toys.classifier(), "hybrid")


@pytest.mark.parametrize(
    ("options", "reason"), [({"momentum": 0.9}, "has no momentum"), ({"update_rule": "SGD", "adam_beta1": 0.5}, "takes none")]
)
def test_options_of_the_other_rule_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        baselines.get("hybrid", **options)
