"""DiZO: the search for how far layers are moved, and what the journal keeps of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods, replay
from zotune.methods.layer_projection import LayerProjection
from zotune.optim.layer_projection import LayerProjections
from zotune.optim.state import StepContext
from zotune.rng.directions import Directions, Key

NAMES = ["0.weight", "1.weight", "4.weight"]  # toys.classifier's matrices


def trained(clip: float, **options) -> tuple[nn.Module, ZerothOrder, dict[str, torch.Tensor]]:
    """A model three steps away from its start, which is returned too."""
    model = toys.classifier()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = methods.dizo(interval=3, iterations=4, clip=clip, projection_lr=0.5, **options)
    optimizer = ZerothOrder(model, method, lr=1e-2)
    for step in range(3):
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
    return model, optimizer, start


def loss_at(model: nn.Module, start: dict[str, torch.Tensor], lengths: dict[str, float], gamma: dict[str, float]) -> float:
    """The loss with every matrix at a distance γ from its start."""
    moved = copy.deepcopy(model).requires_grad_(False)
    for name, p in moved.named_parameters():
        if name in gamma:
            p.copy_(start[name] + gamma[name] / lengths[name] * (p - start[name]))
    return float(toys.loss_function(moved)(toys.batch(seed=3)).double().mean())


def test_a_search_is_its_equation():
    """γ ← clip(γ − s ‖Δ‖ g z), g from losses at γ ± ε z, four times."""
    clip, eps, rate = 0.3, 0.1, 0.5
    model, optimizer, start = trained(clip)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    lengths = {name: float((now[name] - start[name]).norm()) for name in NAMES}
    gamma = dict(lengths)
    for iteration in range(4):
        z = {}
        for name in NAMES:
            most = clip * lengths[name] / eps
            z[name] = float(Directions("gaussian").draw(Key(0, 3, iteration, name, "projection"), (1,)).clamp(-most, most))
        plus, minus = (loss_at(model, start, lengths, {n: gamma[n] + sign * eps * z[n] for n in NAMES}) for sign in (1, -1))
        g = (plus - minus) / (2 * eps)
        for name in NAMES:
            low, high = (1 - clip) * lengths[name], (1 + clip) * lengths[name]
            gamma[name] = min(high, max(low, gamma[name] - rate * lengths[name] * g * z[name]))
    projections = optimizer.run.transform(LayerProjections)
    context = StepContext(0, 3, toys.loss_function(model), [toys.batch(seed=3)])
    with torch.no_grad():
        ratios, forwards, sequences = projections.search(context)
    assert ratios == pytest.approx([gamma[name] / lengths[name] for name in NAMES], rel=1e-4)
    assert (forwards, sequences) == (8, 64) and len(set(ratios)) == 3
    assert all(torch.equal(p, now[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        projections.apply(ratios, 0, 3)
    for name, p in model.named_parameters():
        expected = start[name] + gamma[name] / lengths[name] * (now[name] - start[name]) if name in NAMES else now[name]
        assert torch.allclose(p, expected, atol=1e-6)


def test_without_room_a_search_leaves_mezo(tmp_path):
    """τ = 0: every ratio is 1, and the run is MeZO's bit for bit, eight evaluations later."""
    model, optimizer, _ = trained(0.0)
    other = ZerothOrder(plain := toys.classifier(), methods.mezo(), lr=1e-2)
    for step in range(5):
        if step >= 3:
            optimizer.step(toys.loss_function(model), toys.batch(seed=step))
        other.step(toys.loss_function(plain), toys.batch(seed=step))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert optimizer.forward_passes == other.forward_passes + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratios_are_in_the_journal_within_the_clip(dtype, tmp_path):
    model = toys.classifier(dtype)
    optimizer = ZerothOrder(model, methods.dizo(interval=2, iterations=2, clip=0.2, projection_lr=50.0), lr=1e-2, journal=tmp_path / "j")
    for step in range(6):
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
    found = [record["ratios"] for record in optimizer.journal.records() if isinstance(record, dict) and record["event"] == "projection"]
    first, second = found
    assert all(0.8 <= ratio <= 1.2 for ratio in first + second) and {0.8, 1.2} & {*first, *second}
    replay(copied := toys.classifier(dtype), tmp_path / "j")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_keys_and_values_are_projected_where_there_are_some():
    projection = methods.dizo().projection
    names = ["h.q_proj.weight", "h.k_proj.weight", "h.v_proj.lora_A.default.weight", "h.fc1.weight", "embed_tokens.weight"]
    assert projection.chosen(names) == names[1:3]
    assert projection.chosen(names[3:]) == names[3:]
    assert methods.dizo(projected="matrices").projection.chosen(names) == names
    assert [LayerProjection(5, 1, 0.1, 1.0, 0.2, "matrices").due(step) for step in (0, 4, 5, 10)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 1.0}, r"clip must lie in \[0, 1\)"),
        ({"projection_eps": 0.0}, "projection_eps must be a positive number"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1"),
        ({"projected": "keys"}, "unknown projected 'keys'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        methods.dizo(**options)
