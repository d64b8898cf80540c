"""Guided turns: the output errors are gradients, the guide is a ridge regression of them, and what it says is all that moves."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from trainer_cases import LENGTH, choice_rows, collate_choices, collate_completions, config, same_weights, tiny_llama, trainer, weights
from zotune import ZerothOrder, ZOTrainer, methods, objectives, output_errors, replay
from zotune.directions import Key
from zotune.journal import Journal
from zotune.step_size import RunningMean, StepSize
from zotune.subspaces.guided import QUIET, RIDGE, GuidedCoordinate, guide

ROWS = choice_rows(64)
INTERVAL = 2


def batch(step: int, size: int = 8) -> dict[str, torch.Tensor]:
    start = step * size % len(ROWS)
    return collate_completions(ROWS[start : start + size])


def examples(step: int, count: int) -> list[dict[str, torch.Tensor]]:
    return [collate_completions(ROWS[start : start + 16]) for start in range(0, min(count, len(ROWS)), 16)]


def optimizer(model: torch.nn.Module, lr: float | str = 1e-2, **options) -> ZerothOrder:
    method = methods.lozo_g(**{"interval": INTERVAL, "rank": 2, "guide": 2, "begin": 1, "examples": 48, **options})
    return ZerothOrder(model, method, lr=lr, examples=examples)


def run(model: torch.nn.Module, steps: ZerothOrder, first: int, last: int) -> None:
    loss_fn = objectives.LanguageModelLoss(model)
    for step in range(first, last):
        steps.step(loss_fn, batch(step))


def test_an_error_is_the_gradient_in_the_hidden_state_that_the_head_is_given():
    model, data = tiny_llama(), batch(0)
    given: list[torch.Tensor] = []

    def keep(module, args):
        given.append(args[0].detach().requires_grad_())
        return (given[0],)

    with output_errors.watched() as watch, torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
    handle = model.lm_head.register_forward_pre_hook(keep)
    objectives.LanguageModelLoss(model)(data).sum().backward()  # one token an example is scored
    handle.remove()
    assert torch.allclose(torch.stack(watch.errors), given[0].grad[:, LENGTH - 1], atol=1e-6)


def test_only_scored_tokens_tell_and_no_more_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(output_errors, "MOST_ROWS", 5)
    model, data = tiny_llama(), batch(0)
    data["positions"] = torch.tensor([[3, 4]]).repeat(8, 1)
    data["targets"] = torch.stack([data["input_ids"][:, 4], torch.full((8,), objectives.IGNORE)], dim=1)
    with output_errors.watched() as watch, torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
        objectives.LanguageModelLoss(model)(data)
    assert len(watch.errors) == 5
    assert output_errors.watching() is None


def test_a_guide_is_the_regression_of_errors_on_inputs():
    """P, V of δ̂ = B x, B = Σ δ xᵀ (S + λI)⁻¹ / N; written with n × n matrices here."""
    generator = torch.Generator().manual_seed(0)
    x, d, others = (torch.randn(*shape, generator=generator) for shape in ((30, 12), (30, 9), (50, 12)))
    found = guide(x, d, others, 2).float()
    p, v = found[:9], found[9:]
    x, d, others = x.double(), d.double(), others.double()
    second = others.T @ others / 50 + RIDGE * others.square().mean() * torch.eye(12)
    fit = d.T @ x / 30 @ torch.linalg.inv(second)  # B
    left, _, _ = torch.linalg.svd(fit @ torch.linalg.cholesky(second), full_matrices=False)
    assert torch.allclose((p.T @ left[:, :2].float()).abs(), torch.eye(2), atol=1e-2)
    wanted = (fit.T @ p.double()).float()
    assert torch.allclose(torch.nn.functional.normalize(v, dim=0), torch.nn.functional.normalize(wanted, dim=0), atol=1e-2)
    assert torch.allclose((others.float() @ v).square().mean(dim=0), others.float().square().sum(dim=1).mean(), rtol=2e-2)


def test_a_guide_finds_what_tells_the_errors_apart():
    """Inputs with one number that says the class, behind a hundred that say nothing, and errors that the class decides."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 2, (200,), generator=generator).float() * 2 - 1
    x = torch.randn(200, 100, generator=generator)
    x[:, 7] = label
    direction = torch.nn.functional.normalize(torch.randn(30, generator=generator), dim=0)
    found = guide(x, label.unsqueeze(1) * direction + 0.3 * torch.randn(200, 30, generator=generator), x, 1).float()
    assert float((found[:30, 0] @ direction).abs()) > 0.95
    assert int(found[30:, 0].abs().argmax()) == 7


def test_inputs_that_tell_nothing_give_no_guide():
    assert guide(torch.zeros(4, 3), torch.ones(4, 3), torch.zeros(4, 3), 1) is None
    assert guide(torch.ones(4, 3), torch.zeros(4, 3), torch.ones(4, 3), 1) is None


def test_turns_alternate_and_only_layers_that_write_to_the_hidden_state_are_guided():
    model = tiny_llama()
    steps = optimizer(model)
    seen = []
    for step in range(3 * INTERVAL):
        run(model, steps, step, step + 1)
        seen.append({c.name.split(".")[-2] for c in steps.probe.coordinates if c.guided})
    writers = {"o_proj", "down_proj"}
    assert seen == [set()] * INTERVAL + [writers] * INTERVAL + [set()] * INTERVAL


def test_a_guided_turn_moves_its_layers_within_the_guide_and_leaves_other_matrices_alone():
    model = tiny_llama()
    steps = optimizer(model)
    run(model, steps, 0, INTERVAL)
    steps.fold()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, steps, INTERVAL, 2 * INTERVAL)
    guides = {c.name: (c.p.clone(), c.v.clone()) for c in steps.probe.coordinates if isinstance(c, GuidedCoordinate) and c.guided}
    steps.fold()
    assert len(guides) == 4
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - before[name]
        if parameter.dim() < 2:
            continue
        if name not in guides:
            assert not moved.any(), name
            continue
        p, v = guides[name]
        assert float(moved.norm()) > 0
        inside = p @ torch.linalg.lstsq(p, moved).solution
        inside = (torch.linalg.lstsq(v, inside.T).solution.T) @ v.T
        assert torch.allclose(inside, moved, atol=1e-5 + 1e-3 * float(moved.abs().max())), name


@pytest.mark.parametrize("guide_rank", [1, 3])
@pytest.mark.parametrize("probe", ["batched", "sequential"])
def test_a_guided_coefficient_is_that_of_the_weights_perturbed_by_hand(probe, guide_rank):
    model = tiny_llama()
    method = methods.lozo_g(interval=INTERVAL, guide=guide_rank, begin=1, examples=48, num_directions=1, eps=1e-2, layer_scales=False)
    steps = ZerothOrder(model, method, lr=0.0, examples=examples, probe=probe)
    run(model, steps, 0, INTERVAL + 1)
    hand = copy.deepcopy(model)
    with torch.no_grad():
        here = float(objectives.LanguageModelLoss(hand)(batch(INTERVAL)).mean())
        for coordinate, parameter in zip(steps.probe.coordinates, hand.parameters(), strict=True):
            z = steps.directions.draw(Key(0, INTERVAL, 0, coordinate.name), coordinate.shape)
            if isinstance(coordinate, GuidedCoordinate):
                if not coordinate.guided:
                    continue
                s = z.flatten()[: guide_rank**2].view(guide_rank, guide_rank)
                z = QUIET * math.sqrt(z.numel()) / guide_rank * coordinate.p @ s @ coordinate.v.T
            parameter.add_(z, alpha=1e-2)
        moved = float(objectives.LanguageModelLoss(hand)(batch(INTERVAL)).mean())
    assert float(steps.last.coefficients[0]) == pytest.approx((moved - here) / 1e-2, rel=2e-2, abs=2e-3)


def test_a_run_through_guided_turns_replays_without_the_data(tmp_path):
    model = tiny_llama()
    method = methods.lozo_g(interval=INTERVAL, examples=48, eps="auto")
    steps = ZerothOrder(model, method, lr="auto", examples=examples, journal=tmp_path / "journal.zo")
    run(model, steps, 0, 3 * INTERVAL + 1)
    steps.journal.close()
    fresh = tiny_llama()
    replay(fresh, Journal.open(tmp_path / "journal.zo"))
    assert same_weights(weights(fresh), weights(model))


@pytest.mark.parametrize("at", [INTERVAL, INTERVAL + 1, 2 * INTERVAL, 3 * INTERVAL + 1])
def test_a_run_goes_on_bit_for_bit_from_any_turn(at):
    """The optimiser's state and the weights, in the middle of a guided turn and at either end of one; rates measured for each turn."""
    options = {"lr": "auto", "eps": "auto", "layer_scales": False}
    straight = tiny_llama()
    run(straight, optimizer(straight, **options), 0, 4 * INTERVAL)
    model = tiny_llama()
    first = optimizer(model, **options)
    run(model, first, 0, at)
    kept, stored = first.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    resumed = tiny_llama(seed=1)
    resumed.load_state_dict(stored)
    second = optimizer(resumed, **options)
    second.load_state_dict(kept)
    run(resumed, second, at, 4 * INTERVAL)
    assert same_weights(weights(resumed), weights(straight))


def test_each_turn_has_a_rate_of_its_own():
    model = tiny_llama()
    steps = optimizer(model, lr="auto", eps="auto")
    run(model, steps, 0, INTERVAL)
    first = steps.calibrator.step_size
    run(model, steps, INTERVAL, INTERVAL + 1)
    second = steps.calibrator.step_size
    assert second is not first and second.curvature.count and second.curvature.mean != first.curvature.mean
    plain, guided = steps.calibrator._step_sizes
    assert plain is first and guided is second and guided.promise is not None


def turns(optimizer: ZerothOrder, promises: list[float]) -> list[bool]:
    """Which of the turns that follow are guided, if the loss is 1 and a step of LOZO's promises so much of it before each."""
    chosen = []
    for promise in promises:
        calibrator = optimizer.calibrator
        plain, second = calibrator._step_sizes
        plain.promise, plain.recent = promise, RunningMean(0.1, 1, 1.0, 1.0)
        guided = calibrator.guided_next()
        if guided:
            second.moment.add(1.0)
        if calibrator._step_sizes[guided] is not calibrator.step_size:
            for coordinate in optimizer.probe.coordinates:
                coordinate.guided = guided and isinstance(coordinate, GuidedCoordinate)
            calibrator.step_size.waited = 0
        chosen.append(guided)
    return chosen


def test_lozo_has_the_first_turns_and_a_guide_a_rank_of_its_own():
    model = tiny_llama()
    steps, seen = optimizer(model, begin=2, rank=1, guide=3), []
    for step in range(4 * INTERVAL):
        run(model, steps, step, step + 1)
        seen.append({tuple(c.p.shape[1:]) + tuple(c.v.shape[1:]) for c in steps.probe.coordinates if getattr(c, "guided", False)})
    assert seen == [set()] * 2 * INTERVAL + [{(3, 3)}] * INTERVAL + [set()] * INTERVAL
    assert all(c.v.shape[1] == 1 and not c.guided for c in steps.probe.coordinates if isinstance(c, GuidedCoordinate))


def test_a_guide_waits_until_others_promise_little_and_they_have_every_fourth_turn_then():
    steps = optimizer(tiny_llama(), lr="auto", eps="auto")
    assert turns(steps, [0.2, 0.11, *[0.01] * 3, *[0.2] * 6]) == [False, False, *[True, True, True, False] * 2, True]


def test_what_was_known_before_others_moved_counts_for_less():
    size = StepSize(agreement=RunningMean(0.15, 9, 0.5, 0.25), waited=2, lowest=1.0)
    size.fade()
    size.agreement.add(0.0)
    assert size.agreement.mean == pytest.approx(0.5 * 3 / 4) and size.waited == 0 and size.lowest is None


@pytest.mark.parametrize("loss", ["choices", "my own"])
def test_a_loss_that_tells_no_errors_has_lozos_turns_only(loss):
    model = tiny_llama()
    steps = optimizer(model, layer_scales=False)
    own = objectives.ChoiceLoss(model) if loss == "choices" else lambda data: model(data["input_ids"]).logits.square().mean(dim=(1, 2))
    collate = collate_choices if loss == "choices" else collate_completions
    steps.examples = lambda step, count: [collate(ROWS[:8]) for _ in range(count // 8)]
    for _ in range(2 * INTERVAL):
        steps.step(own, collate(ROWS[:8]))
        assert not any(c.guided for c in steps.probe.coordinates)
        assert all(bool(c.v.any()) for c in steps.probe.coordinates if isinstance(c, GuidedCoordinate))
    assert steps.sequences_evaluated == 2 * INTERVAL * 4 * 8 + 8  # it was asked once, for eight examples


def test_where_no_layer_could_be_guided_nothing_is_looked_at():
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    steps = optimizer(model, layer_scales=False)
    run(model, steps, 0, INTERVAL + 1)
    assert steps.sequences_evaluated == (INTERVAL + 1) * 4 * 8


def test_looking_at_examples_is_counted_and_writes_nothing():
    model = tiny_llama()
    steps = optimizer(model, lr=0.0, layer_scales=False)
    run(model, steps, 0, INTERVAL)
    before, counted, state = weights(model), steps.sequences_evaluated, torch.get_rng_state()
    asked = []
    steps.examples = lambda step, count: asked.append((step, count)) or examples(step, count)
    run(model, steps, INTERVAL, INTERVAL + 1)
    assert asked == [(INTERVAL, 48)]
    assert steps.sequences_evaluated - counted == 48 + 4 * 8
    assert same_weights(weights(model), before) and torch.equal(torch.get_rng_state(), state)


def test_a_trainer_gives_examples_of_its_own_data_the_same_whenever_asked(tmp_path):
    made = ZOTrainer(model=tiny_llama(), args=config(tmp_path, method="lozo-g"), train_dataset=ROWS, data_collator=collate_completions)
    state = torch.get_rng_state()
    first, again, other = made._examples(15, 40), made._examples(15, 40), made._examples(45, 40)
    assert torch.equal(torch.get_rng_state(), state)
    ids = [torch.cat([one["input_ids"] for one in found]) for found in (first, again, other)]
    assert ids[0].shape[0] == 40 and torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    assert len(ids[0].unique(dim=0)) == 40


def test_a_resumed_training_is_the_straight_one_in_a_guided_turn(tmp_path):
    options = {
        "method": "lozo-g",
        "method_args": {"interval": 2, "examples": 32},
        "data_collator": collate_completions,
        "learning_rate": "auto",
        "eps": "auto",
        "per_device_train_batch_size": 8,
    }
    straight = trainer(tmp_path / "straight", max_steps=6, **options)
    straight.train()
    first = trainer(tmp_path / "resumed", max_steps=6, save_strategy="steps", save_steps=3, **options)
    first.train()
    second = trainer(tmp_path / "resumed", max_steps=6, save_strategy="steps", save_steps=3, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    assert same_weights(weights(straight.model), weights(second.model))


def test_a_number_of_examples_below_one_is_refused():
    with pytest.raises(ValueError, match="examples must be a whole number"):
        methods.lozo_g(examples=0)
