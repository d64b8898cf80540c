"""Scales of layers: equal shares for all coordinates, the same run after a replay and a resume, nothing changed by measuring."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zotune import ZerothOrder, methods
from zotune.optim.calibration import layer_scales
from zotune.optim.journal import Journal
from zotune.optim.replay import replay


class Blocks(nn.Module):
    """Two blocks of very different sensitivity, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2)])
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.head(4 * self.blocks[1](self.blocks[0](x)))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def loss_of(model):
    return lambda b: nn.functional.cross_entropy(model(b[0]), b[1], reduction="none")


def optimizer_of(model, **options):
    return ZerothOrder(model, methods.lozo_e(**{"interval": 4, "eps": 1e-3, **options}), lr=1e-2)


def test_layers_are_blocks_and_matrices_outside_of_them():
    optimizer = optimizer_of(Blocks())
    assert [[c.name for c in layer] for layer in optimizer.layers] == [
        ["head.weight"],
        ["blocks.0.0.weight", "blocks.0.2.weight"],
        ["blocks.1.0.weight", "blocks.1.2.weight"],
    ]
    many = nn.ModuleList([nn.Linear(4, 4) for _ in range(20)])
    coordinates = [c for group in ZerothOrder(many, methods.lozo(rank=1)).run.state.coordinates for c in group if hasattr(c, "v")]
    merged = layer_scales.layers(coordinates)
    assert len(merged) <= layer_scales.LAYERS and [c for layer in merged for c in layer] == coordinates
    assert layer_scales.layers(coordinates[:1]) == []


@pytest.mark.parametrize(
    "directions",
    [{"num_directions": 1}, {"directions_per": "group", "group_size": 2}, {"num_directions": 4, "directions_per": "batch"}],
    ids=["example", "group", "batch"],
)
def test_scaled_layers_have_like_shares_a_coordinate(directions):
    """σ_l² n_l / d_l, with n_l from autograd, is far apart before and within sampling error of one number after."""
    model = Blocks()
    examples, weights = batch(), dict(model.named_parameters())
    squares = dict.fromkeys((name for name, p in weights.items() if p.dim() == 2), 0.0)
    for loss in loss_of(model)(examples):
        for name, gradient in zip(squares, torch.autograd.grad(loss, [weights[n] for n in squares], retain_graph=True), strict=True):
            squares[name] += float(gradient.square().sum())
    optimizer = optimizer_of(model, **directions)
    assert {layer[0].scale for layer in optimizer.layers} == {1.0}
    optimizer.step(loss_of(model), examples)
    n = [sum(squares[c.name] for c in layer) / sum(c.parameter.numel() for c in layer) for layer in optimizer.layers]
    shares = [layer[0].scale ** 2 * size for layer, size in zip(optimizer.layers, n, strict=True)]
    assert max(n) / min(n) > 15 and max(shares) / min(shares) < 6


def test_measuring_writes_no_weight_and_touches_no_generator():
    model = Blocks()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer = ZerothOrder(model, methods.lozo_e(interval=4, eps=1e-3), lr=0.0)
    for step in range(6):
        optimizer.step(loss_of(model), batch(step))
    optimizer.remove_hooks()
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_loss_that_is_not_finite_leaves_the_scales_alone():
    model = Blocks()
    optimizer = optimizer_of(model)
    optimizer.step(lambda b: loss_of(model)(b) * torch.nan, batch())
    assert {layer[0].scale for layer in optimizer.layers} == {1.0}


@pytest.mark.parametrize("rule", ["SGD", "EMASGD"])
def test_a_run_with_scales_replays_and_resumes(tmp_path, rule):
    """Scales change at steps 0, 4 and 16; bit for bit the same weights from the journal, and from any checkpoint between."""

    def new(journal=None):
        model = Blocks()
        return model, ZerothOrder(model, methods.lozo_e(interval=4, eps=1e-3, update_rule=rule), lr=1e-2, journal=journal)

    def go_on(model, optimizer, start, stop):
        for step in range(start, stop):
            optimizer.step(loss_of(model), batch(step))

    straight, optimizer = new(tmp_path / "j")
    go_on(straight, optimizer, 0, 20)
    optimizer.remove_hooks()
    events = [r["event"] for r in Journal.open(tmp_path / "j").records() if isinstance(r, dict)]
    assert events.count("scales") == 3
    replayed = Blocks()
    replay(replayed, tmp_path / "j").remove_hooks()
    ends = [replayed]
    for stop in (3, 16):
        model, optimizer = new()
        go_on(model, optimizer, 0, stop)
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        model, optimizer = new()
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        go_on(model, optimizer, stop, 20)
        optimizer.remove_hooks()
        ends.append(model)
    for end in ends:
        assert all(torch.equal(end.state_dict()[name], weight) for name, weight in straight.state_dict().items())
