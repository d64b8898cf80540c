"""Guided steps: what a forward pass tells is the derivative, losses along it tell its scale and rate, and turns go by what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from guided_runs import INTERVAL, batch, examples, guided_coordinates, optimizer, run
from trainer_cases import same_weights, tiny_llama, weights
from zotune import ZerothOrder, methods, objectives
from zotune.optim.calibration.running_mean import RunningMean
from zotune.optim.calibration.step_size import FORGETTING, StepSize
from zotune.optim.journal import Journal
from zotune.optim.state import StepContext


def begun(model: nn.Module, **options) -> ZerothOrder:
    """An optimizer at the start of a guided turn, nothing moved."""
    steps = optimizer(model, **{"lr": 0.0, **options})
    run(model, steps, 0, 1)
    assert steps.run.along_output_gradients
    return steps


def told(steps: ZerothOrder, model: nn.Module, parts: list, loss_fn=None):
    with torch.no_grad():
        return steps.output_gradients.derivatives(StepContext(0, 1, loss_fn or objectives.LanguageModelLoss(model), parts))


def gradients(model: nn.Module, data, names: list[str]) -> list[list[torch.Tensor]]:
    """By backprop: every example's gradient in the weights of these names."""
    parameters = dict(model.named_parameters())
    losses = objectives.LanguageModelLoss(model)(data)
    return [list(torch.autograd.grad(loss, [parameters[n] for n in names], retain_graph=True)) for loss in losses]


@pytest.mark.parametrize("norm", [True, False])
def test_the_last_layers_signal_is_its_gradient_within_the_guide(norm):
    """Of one position: times the root mean square of its hidden state, where a norm stands between the layer and the head."""
    model = tiny_llama()
    if not norm:
        model.model.norm = nn.Identity()
    else:
        nn.init.uniform_(model.model.norm.weight, 0.3, 3.0, generator=torch.Generator().manual_seed(5))
    steps, states = begun(model), []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    (last,) = [c for c in guided_coordinates(steps) if c.name == "model.layers.1.mlp.down_proj.weight"]
    first = sum(c.num_guided for c in guided_coordinates(steps)[: guided_coordinates(steps).index(last)])
    slopes = told(steps, model, [batch(1)]).slopes[first : first + last.num_guided]
    handle.remove()
    place = batch(1)["positions"][:, 0]
    sizes = states[0][torch.arange(len(place)), place].square().mean(dim=1).sqrt()
    for example, (gradient,) in enumerate(gradients(model, batch(1), [last.name])):
        wanted = last.p.T @ gradient @ last.v * (sizes[example] if norm else 1)
        assert torch.allclose(slopes[:, example], wanted.flatten(), rtol=5e-3 if norm else 1e-3, atol=1e-6)  # the norm has an epsilon


def test_other_layers_are_told_as_if_nothing_but_the_norm_stood_between():
    """Σ (Pᵀδ)(Vᵀx)ᵀ with δ = g ⊙ δ_z less its part along u = z / g, and x of the layer, written out."""
    model = tiny_llama()
    nn.init.uniform_(model.model.norm.weight, 0.3, 3.0, generator=torch.Generator().manual_seed(5))
    steps = begun(model)
    layer, seen = model.model.layers[0].self_attn.o_proj, []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = told(steps, model, [batch(1)])
    handle.remove()
    data, states = batch(1), []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
    handle.remove()
    place = data["positions"][:, 0]
    rows = torch.arange(len(place))
    z, weight = states[0][rows, place], model.model.norm.weight.detach()
    wrong = model.lm_head(z).detach().softmax(1)
    wrong[rows, data["targets"][:, 0]] -= 1
    delta, u = wrong @ model.lm_head.weight.detach() * weight, z / weight
    delta = delta - u * (u * delta).mean(dim=1, keepdim=True)
    (coordinate,) = [c for c in guided_coordinates(steps) if c.parameter is layer.weight]
    first = sum(c.num_guided for c in guided_coordinates(steps)[: guided_coordinates(steps).index(coordinate)])
    wanted = torch.einsum("ia,ib->iab", delta @ coordinate.p, seen[0][rows, place] @ coordinate.v).flatten(1).T
    assert torch.allclose(found.slopes[first : first + coordinate.num_guided], wanted, rtol=1e-3, atol=1e-6)


def test_several_tokens_of_a_text_add_up():
    model = tiny_llama()
    model.model.norm = nn.Identity()
    data = batch(1)
    data["positions"] = torch.tensor([[3, 4]]).repeat(8, 1)
    data["targets"] = data["input_ids"][:, 4:6].clone()
    steps = begun(model)
    last = guided_coordinates(steps)[-1]
    slopes = told(steps, model, [data]).slopes[-last.num_guided :]
    for example, (gradient,) in enumerate(gradients(model, data, [last.name])):
        assert torch.allclose(slopes[:, example], (last.p.T @ gradient @ last.v).flatten(), rtol=1e-3, atol=1e-6)


def test_micro_batches_give_the_output_gradients_of_the_batch():
    model = tiny_llama()
    steps, data = begun(model), batch(1)
    whole = told(steps, model, [data])
    halves = told(steps, model, [{k: v[:4] for k, v in data.items()}, {k: v[4:] for k, v in data.items()}])
    assert torch.allclose(whole.slopes, halves.slopes, atol=1e-6) and torch.allclose(whole.losses, halves.losses, atol=1e-6)
    assert whole.evaluated == halves.evaluated == 8
    single = told(steps, model, [data], lambda data: objectives.LanguageModelLoss(model)(data).mean())
    assert torch.allclose(single.slopes[:, 0], whole.slopes.mean(dim=1), atol=1e-6) and single.slopes.shape[1] == 1


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_the_scale_is_the_losss_slope_over_the_predicted_slope(rule):
    """Along the derivatives' mean, or, where steps are normalized, along its orthogonal factors."""
    model = tiny_llama()
    steps = begun(model, update_rule=rule)
    found, guided = told(steps, model, [batch(0)]), guided_coordinates(steps)
    mean = found.slopes.mean(dim=1)
    names = [c.name for c in guided]
    per_example = gradients(model, batch(0), names)
    parts = mean.split([c.num_guided for c in guided])
    true, predicted = 0.0, 0.0
    for place, (coordinate, part) in enumerate(zip(guided, parts, strict=True)):
        gradient = torch.stack([each[place] for each in per_example]).mean(dim=0)
        along = part if rule == "Adam" else orthogonal_factor(part.view(2, 2)).flatten()
        true += float((coordinate.p.T @ gradient @ coordinate.v).flatten() @ along)
        predicted += float(part @ along)
    assert steps.output_gradients.alpha == pytest.approx(true / predicted, rel=2e-2)


def orthogonal_factor(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def test_a_step_goes_along_the_orthogonal_factor_of_the_mean_of_what_was_told():
    """β M + (1 − β) Ĝ of each layer, whatever its size, and every step's Ĝ in the journal as it was told."""
    model = tiny_llama()
    steps = begun(model)  # has told once, at a rate of 0
    told_before = steps.last_report.coefficients
    for group in steps.param_groups:
        group["lr"] = 0.3
    found = told(steps, model, [batch(1)])
    run(model, steps, 1, 2)
    now = steps.last_report.coefficients
    assert torch.allclose(now, found.slopes.mean(dim=1), rtol=5e-3, atol=1e-7)  # bfloat16 numbers
    sizes = [c.num_guided for c in guided_coordinates(steps)]
    for coordinate, before, after in zip(guided_coordinates(steps), told_before.split(sizes), now.split(sizes), strict=True):
        moment = (0.9 * 0.1 * before + 0.1 * after).view(2, 2)
        assert torch.allclose(coordinate.moment, moment, rtol=1e-4, atol=1e-9)
        step = coordinate.core.flatten()[: coordinate.num_guided].view(2, 2)
        assert torch.allclose(step, -0.3 * orthogonal_factor(moment), atol=1e-4)
        assert torch.allclose(step @ step.T, 0.09 * torch.eye(2), atol=1e-4)
        assert not coordinate.core.flatten()[coordinate.num_guided :].any()
    assert steps.last_report.loss_diff is None


def test_momentum_goes_on_within_the_next_phases_projections():
    """M is that of the gradient P M Vᵀ: what the new P and V span of it stays. A phase of drawn directions ends it."""
    model = tiny_llama()
    steps = optimizer(model, lr=0.01)
    steps.output_gradients.limit_phases(2, 2)
    run(model, steps, 0, INTERVAL)
    before = [(c.p.clone(), c.v.clone(), c.moment.clone()) for c in guided_coordinates(steps)]
    run(model, steps, INTERVAL, INTERVAL + 1)
    sizes = [c.num_guided for c in guided_coordinates(steps)]
    for c, (p, v, moment), told_now in zip(guided_coordinates(steps), before, steps.last_report.coefficients.split(sizes), strict=True):
        carried = c.p.T @ (p @ moment @ v.T) @ c.v
        assert torch.allclose(c.moment, 0.9 * carried + 0.1 * told_now.view(2, 2), rtol=1e-3, atol=1e-8)
        assert bool(carried.any())
    run(model, steps, INTERVAL + 1, 3 * INTERVAL)
    assert not steps.run.along_output_gradients
    run(model, steps, 3 * INTERVAL, 3 * INTERVAL + 1)
    assert steps.run.along_output_gradients
    for c, told_now in zip(guided_coordinates(steps), steps.last_report.coefficients.split(sizes), strict=True):
        assert torch.allclose(c.moment, 0.1 * told_now.view(2, 2), rtol=1e-4, atol=1e-9)


def test_another_rule_is_given_the_scaled_mean_of_what_was_told():
    model = tiny_llama()
    steps = begun(model, update_rule="SGD", update_rule_args={"momentum": 1e-9})
    found = told(steps, model, [batch(1)])
    for group in steps.param_groups:
        group["lr"] = 0.3
    run(model, steps, 1, 2)
    wanted = steps.output_gradients.alpha * found.slopes.mean(dim=1)
    assert torch.allclose(steps.last_report.coefficients, wanted, rtol=5e-3, atol=1e-7)  # bfloat16 numbers
    parts = wanted.split([c.num_guided for c in guided_coordinates(steps)])
    for coordinate, part in zip(guided_coordinates(steps), parts, strict=True):
        assert torch.allclose(coordinate.core.flatten()[: coordinate.num_guided], -0.3 * part, rtol=5e-3, atol=1e-8)
        assert not coordinate.core.flatten()[coordinate.num_guided :].any()
    assert steps.last_report.loss_diff is None


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_measured_rates_lower_the_loss_under_rules_with_a_scale(rule):
    model = tiny_llama()
    steps = optimizer(model, lr="auto", eps="auto", update_rule=rule, interval=8)
    losses = []
    for _ in range(16):
        losses.append(float(steps.step(objectives.LanguageModelLoss(model), batch(0))))
    assert losses[-1] < 0.95 * losses[0]
    assert steps.calibrator.step_size.moment.count == 0  # LOZO's turn has not come


def test_a_step_goes_a_twentieth_of_the_way_to_the_first_minimum():
    """Of the parabola along the first direction; with half of 16 examples √½ of that; the same in later steps."""
    model = tiny_llama()
    steps = optimizer(model, lr="auto", interval=4)
    run(model, steps, 0, 1)
    gradients, (rate,) = steps.output_gradients, steps.last_report.lr
    length = math.sqrt(sum(c.p.shape[1] for c in guided_coordinates(steps)))
    assert rate == pytest.approx(gradients.distance.value / length, rel=1e-5)
    fresh = tiny_llama()
    others = begun(fresh, interval=4)
    found = told(others, fresh, [batch(0)])
    along, _ = others.output_gradients.direction(found)
    assert float(along.norm()) == pytest.approx(1.0)
    context = StepContext(0, 0, objectives.LanguageModelLoss(fresh), [batch(0)])
    evaluate = others.evaluator.function(context)
    with torch.no_grad(), others.output_gradients._along(along):
        plus, minus = (others.output_gradients._at(evaluate, sign * gradients.size.radius, 0, 0).double() for sign in (1.0, -1.0))
    slope = float((plus - minus).mean()) / (2 * gradients.size.radius)
    curvature = float((plus + minus - 2 * found.losses.double()).mean()) / gradients.size.radius**2
    spread = abs(curvature)
    expected = 0.05 * math.sqrt(0.5) * slope / max(curvature, 0.2 * spread)
    assert gradients.distance.value == pytest.approx(expected, rel=0.05)
    run(model, steps, 1, 4)
    assert steps.last_report.lr == (pytest.approx(gradients.size.brake * rate, rel=1e-5),)


def test_measuring_looks_where_steps_go_and_says_so(tmp_path):
    model = tiny_llama()
    steps = ZerothOrder(
        model,
        methods.lozo_g(interval=8, guide=2, examples=48, update_rule="Adam"),
        lr="auto",
        sample_batches=examples,
        journal=tmp_path / "j.zo",
    )
    run(model, steps, 0, 6)
    size = steps.output_gradients.size
    assert size.stride / 8 <= size.radius * 1.0001 or size.leapt
    steps.journal.close()
    events = [r for r in Journal.open(tmp_path / "j.zo").records() if isinstance(r, dict) and r["event"] == "measured"]
    assert 4 <= len(events) <= 6  # at steps 0, 1, 2 and 4, and before a step that would go much farther
    assert all(e["scale"] > 0 and e["curvature"] > 0 and e["forwards"] >= 2 for e in events)
    assert set(events[0]) >= {"state", "output_gradients"} and "output_gradients" not in events[1]


def test_evaluating_along_what_was_told_leaves_nothing_behind():
    model = tiny_llama()
    steps = begun(model)
    before = weights(model)
    found, gradients = told(steps, model, [batch(0)]), steps.output_gradients
    gradients.scale = RunningMean(FORGETTING)

    def fails() -> torch.Tensor:
        raise RuntimeError("no loss")

    with torch.no_grad(), pytest.raises(RuntimeError, match="no loss"):
        gradients.measure(found, fails, 0, 0)
    assert all(c.fixed_direction is None for c in gradients.coordinates)
    assert same_weights(weights(model), before)
    assert torch.equal(told(steps, model, [batch(0)]).losses, found.losses)


def test_a_loss_that_rises_that_way_stops_the_turn():
    """A head whose feedback is turned round tells the opposite of the gradient."""
    model = tiny_llama()
    steps = begun(model, interval=4, lr=0.1)
    steps.output_gradients.scale = RunningMean(FORGETTING)
    found = told(steps, model, [batch(0)])
    flipped = found._replace(slopes=-found.slopes)
    context = StepContext(0, 0, objectives.LanguageModelLoss(model), [batch(0)])
    with torch.no_grad():
        steps.output_gradients.measure(flipped, steps.evaluator.function(context), 0, 0)
    assert steps.output_gradients.alpha == 0
    assert not steps.output_gradients.estimate(flipped).coefficients.any()
    assert not steps.output_gradients.choose_phase(None, 4)


def test_losses_that_are_not_finite_skip_the_step():
    model = tiny_llama()
    steps = begun(model)
    before = weights(model)
    bad = lambda data: objectives.LanguageModelLoss(model)(data) * math.nan  # noqa: E731
    assert math.isnan(float(steps.step(bad, batch(1))))
    assert all(steps.last_report.skipped) and same_weights(weights(model), before)


def test_weight_decay_goes_on_in_guided_turns():
    model = tiny_llama()
    steps = ZerothOrder(model, methods.lozo_g(interval=2, guide=2, examples=48), lr=0.1, weight_decay=0.5, sample_batches=examples)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    run(model, steps, 0, 2)
    steps.flush_updates()
    assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight, before * (1 - 0.05) ** 2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_a_decayed_group_are_decayed_too(dtype):
    model = tiny_llama(dtype=dtype)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.5}]
    steps = ZerothOrder(model, methods.lozo_g(interval=4, guide=2, examples=48), lr=0.1, params=groups, sample_batches=examples)
    run(model, steps, 0, 3)
    assert steps.run.along_output_gradients
    assert torch.allclose(model.model.norm.weight.detach().float(), torch.full((32,), 0.95**3), atol=1e-6 if dtype.itemsize == 4 else 4e-3)


# -- turns -----------------------------------------------------------------------------------------------------------------------------


def turns(steps: ZerothOrder, number: int, plain: StepSize | None) -> str:
    """Who has the next so many turns: g or l."""
    chosen = ""
    for _ in range(number):
        guided = steps.output_gradients.choose_phase(plain, 4)
        for coordinate in steps.output_gradients.coordinates:
            coordinate.guided = guided
        steps.output_gradients.phase_began()
        chosen += "g" if guided else "l"
    return chosen


def test_lozos_turns_come_after_so_many_guided_ones():
    steps = optimizer(tiny_llama())
    assert turns(steps, 40, None) == ("g" * 16 + "l") * 2 + "g" * 6


def test_they_come_half_as_often_while_they_promise_less():
    steps = optimizer(tiny_llama(), lr="auto", eps="auto")
    steps.output_gradients.size.expected_fall = 0.01
    assert turns(steps, 17 + 33, StepSize(expected_fall=0.03)) == "g" * 16 + "l" + "g" * 32 + "l"  # four evaluations for it
    steps = optimizer(tiny_llama(), lr="auto", eps="auto")
    steps.output_gradients.size.expected_fall = 0.01
    assert turns(steps, 17 + 17, StepSize(expected_fall=0.05)) == ("g" * 16 + "l") * 2


def test_each_phase_has_its_own_rate_and_old_measurements_fade():
    model = tiny_llama()
    steps = optimizer(model, lr="auto", eps="auto")
    steps.output_gradients.limit_phases(1)
    run(model, steps, 0, 2 * INTERVAL)
    guided, plain = steps.output_gradients.size, steps.calibrator.step_size
    assert guided.expected_fall is not None and plain.expected_fall is not None
    assert guided.moment.count and plain.moment.count and guided.moment.mean != plain.moment.mean
    assert guided.curvature.mean != plain.curvature.mean
    size = StepSize(agreement=RunningMean(0.15, 9, 0.5, 0.25), waited=2, lowest=1.0)
    size.fade()
    size.agreement.add(0.0)
    assert size.agreement.mean == pytest.approx(0.5 * 3 / 4) and size.waited == 0 and size.lowest is None


def test_the_guides_state_is_plain_and_comes_back():
    model = tiny_llama()
    steps = optimizer(model, lr="auto", eps="auto")
    run(model, steps, 0, 1)
    state = steps.output_gradients.state()
    other = optimizer(tiny_llama(), lr="auto", eps="auto")
    other.output_gradients.restore(state)
    assert other.output_gradients.state() == state and other.output_gradients.alpha == steps.output_gradients.alpha
