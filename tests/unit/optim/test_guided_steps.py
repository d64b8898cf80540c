"""Guided turns: the output errors are gradients, the guide is a ridge regression of them, and what it says is all that moves.

Their steps are tested in test_output_gradients.py.
"""

from __future__ import annotations

import pytest
import torch

from guided_runs import INTERVAL, ROWS, batch, examples, guided_coordinates, optimizer, run
from trainer_cases import LENGTH, collate_choices, collate_completions, config, same_weights, tiny_llama, trainer, weights
from zotune import ZerothOrder, ZOTrainer, methods, objectives, replay
from zotune.objectives import output_gradients
from zotune.optim.journal import Journal
from zotune.optim.journal_records import StepRecord
from zotune.subspaces.guided import GuidedCoordinate
from zotune.subspaces.guided_projection import RIDGE, CompressedRows, fit_projection, polar
from zotune.training import resume as resuming


def in_the_hidden_state(model: torch.nn.Module, loss_fn, data) -> torch.Tensor:
    """By backprop: the gradient of all losses in what the final norm is given, times the root mean squares of that, (R, T, d)."""
    given: list[torch.Tensor] = []

    def keep(module, args):
        given.append(args[0].detach().requires_grad_())
        return (given[0],)

    handle = model.model.norm.register_forward_pre_hook(keep)
    loss_fn(data).sum().backward()
    handle.remove()
    return given[0].grad * given[0].detach().square().mean(dim=2, keepdim=True).sqrt()


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to the norm's epsilon, which is not small beside these states."""
    return bool((found - wanted).abs().max() <= 5e-3 * wanted.abs().max())


def test_an_error_is_the_gradient_in_the_last_hidden_state():
    model, data = tiny_llama(), batch(0)
    with output_gradients.recording() as recorder, torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
    gradient = in_the_hidden_state(model, objectives.LanguageModelLoss(model), data)  # one token an example is scored
    assert near(torch.cat(recorder.gradients), gradient[:, LENGTH - 1])


def test_the_error_of_a_choice_is_that_of_its_options_alone():
    model, data = tiny_llama(), collate_choices(ROWS[:8])
    assert "option_ids" in data
    with output_gradients.recording() as recorder, torch.no_grad():
        objectives.ChoiceLoss(model)(data)
    gradients = in_the_hidden_state(model, objectives.ChoiceLoss(model), data)[torch.arange(8), data["positions"][:, 0]]
    assert float(gradients.norm()) > 0
    assert near(torch.cat(recorder.gradients), gradients)


def test_scores_that_are_no_loss_tell_nothing():
    model = tiny_llama()
    with output_gradients.recording() as recorder, torch.no_grad():
        objectives.choice_scores(model, collate_choices(ROWS[:8]))
    assert not recorder.gradients


def two_tokens(size: int = 8) -> dict[str, torch.Tensor]:
    """A batch that scores two tokens of every second text, and one of the others."""
    data = batch(0, size)
    data["positions"] = torch.tensor([[3, 4]]).repeat(size, 1)
    data["targets"] = data["input_ids"][:, 4:6].clone()
    data["targets"][::2, 1] = objectives.IGNORE
    return data


def test_a_texts_tokens_share_its_loss():
    model, data = tiny_llama(), two_tokens()
    with output_gradients.recording() as recorder, torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
    gradients = in_the_hidden_state(model, objectives.LanguageModelLoss(model), data)
    (texts,), (errors,) = recorder.examples, recorder.gradients
    assert texts.tolist() == torch.arange(8).repeat_interleave(2).tolist()
    places = torch.tensor([3, 4] * 8)
    assert near(errors, gradients[texts, places])
    assert not errors[1::4].any() and bool(errors[3::4].any(dim=1).all())  # every second text has one token
    with output_gradients.recording(100) as recorder, torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
    assert recorder.examples[0].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    assert torch.equal(recorder.gradients[0], errors[[0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15]])


def test_errors_are_made_a_few_rows_at_a_time():
    model, data = tiny_llama(), two_tokens()
    found = []
    for elements in (2**24, 300):
        with output_gradients.recording(chunk=elements) as recorder, torch.no_grad():
            objectives.LanguageModelLoss(model)(data)
        found.append(recorder.gradients[0])
    assert torch.allclose(*found, atol=1e-6)


def test_only_scored_tokens_are_sampled_up_to_the_capacity():
    model, data = tiny_llama(), two_tokens()
    data["targets"][:, 1] = objectives.IGNORE
    data["positions"], data["targets"] = data["positions"][:, :1], data["targets"][:, :1]
    with output_gradients.recording(5) as recorder, torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
        objectives.LanguageModelLoss(model)(data)
    assert sum(map(len, recorder.gradients)) == 5
    with output_gradients.recording() as recorder, torch.no_grad():
        objectives.LanguageModelLoss(model)(data)
        objectives.LanguageModelLoss(model)(data)
    assert torch.cat(recorder.examples).tolist() == list(range(16)) and recorder.num_examples == 16
    assert output_gradients.active_recorder() is None


@pytest.mark.parametrize("number", [8, 50])
def test_a_guide_is_the_regression_of_errors_on_inputs(number):
    """P, and V a basis of BᵀP, of δ̂ = B x, B = Σ δ xᵀ (S + λI)⁻¹ / N; of fewer or more other rows than numbers in one."""
    generator = torch.Generator().manual_seed(0)
    x, d, others = (torch.randn(*shape, generator=generator) for shape in ((30, 12), (30, 9), (number, 12)))
    p, v = (side.float() for side in fit_projection(x, d, others, 2))
    x, d, others = x.double(), d.double(), others.double()
    second = others.T @ others / number + RIDGE * others.square().mean() * torch.eye(12)
    fit = d.T @ x / 30 @ torch.linalg.inv(second)  # B
    left, _, _ = torch.linalg.svd(fit @ torch.linalg.cholesky(second), full_matrices=False)
    assert torch.allclose((p.T @ left[:, :2].float()).abs(), torch.eye(2), atol=1e-2)
    wanted = (fit.T @ p.double()).float()
    assert torch.allclose(v.T @ v, torch.eye(2), atol=1e-5)
    assert torch.allclose(v @ (v.T @ wanted), wanted, atol=1e-2 * float(wanted.abs().max()))


def test_collinear_output_gradients_give_one_exact_projection():
    """As those of two options have: (p − y) (W₁ − W₂)."""
    generator = torch.Generator().manual_seed(0)
    x, others = torch.randn(128, 12, generator=generator), torch.randn(500, 12, generator=generator)
    vector, share = torch.randn(9, generator=generator), torch.randn(128, 1, generator=generator)
    p, v = fit_projection(x, share * vector, others, 4)
    assert torch.allclose(p[:, 0].float().abs(), torch.nn.functional.normalize(vector, dim=0).abs(), atol=1e-2)
    assert not p[:, 1:].any() and not v[:, 1:].any() and v[:, 0].any()


def test_of_few_texts_more_positions_are_sampled():
    states, mask, scored = torch.randn(2, 640, 3), torch.ones(2, 640, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
    found = []
    with output_gradients.recording(256) as recorder:
        for _ in range(10):
            recorder.begin(scored, scored == 0, mask)
            found.append(len(recorder.sampled_rows(states)))
    assert found == [64 + 32, 16 + 8] + [8] * 8


def test_rows_in_a_byte_a_number_are_a_guides_within_rounding():
    rows = torch.randn(60, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 60).unsqueeze(1)
    kept = CompressedRows(torch.float8_e4m3fn)
    for part in rows.split(25):
        kept.add(part)
    assert all(part.dtype.itemsize == 1 for part, _ in kept.parts)
    found = kept.all()
    assert (found - rows).abs().max() <= 2**-4 * rows.abs().max()
    assert torch.all(((found - rows).square().sum(dim=1) / rows.square().sum(dim=1)) < 1.5e-3)


def test_a_guide_finds_what_tells_the_errors_apart():
    """Inputs with one number that says the class, behind a hundred that say nothing, and errors that the class decides."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 2, (200,), generator=generator).float() * 2 - 1
    x = torch.randn(200, 100, generator=generator)
    x[:, 7] = label
    direction = torch.nn.functional.normalize(torch.randn(30, generator=generator), dim=0)
    p, v = fit_projection(x, label.unsqueeze(1) * direction + 0.3 * torch.randn(200, 30, generator=generator), x, 1)
    assert float((p[:, 0].float() @ direction).abs()) > 0.95
    assert int(v[:, 0].abs().argmax()) == 7


def test_few_errors_give_a_guide_of_fewer_columns():
    generator = torch.Generator().manual_seed(0)
    x, d, others = (torch.randn(*shape, generator=generator) for shape in ((3, 12), (3, 9), (50, 12)))
    p, v = fit_projection(x, d, others, 5)
    assert p.shape == (9, 5) and v.shape == (12, 5)
    assert bool(p[:, :3].any(dim=0).all()) and bool(v[:, :3].any(dim=0).all())
    assert not p[:, 3:].any() and not v[:, 3:].any()


def test_inputs_that_tell_nothing_give_no_guide():
    assert fit_projection(torch.zeros(4, 3), torch.ones(4, 3), torch.zeros(4, 3), 1) is None
    assert fit_projection(torch.ones(4, 3), torch.zeros(4, 3), torch.ones(4, 3), 1) is None


def test_only_layers_that_write_to_the_hidden_state_are_guided():
    model = tiny_llama()
    steps = optimizer(model)
    run(model, steps, 0, 1)
    assert {c.name.split(".")[-2] for c in guided_coordinates(steps)} == {"o_proj", "down_proj"}
    assert len(guided_coordinates(steps)) == 4


def test_gpt2s_layers_are_guided_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()
    steps = optimizer(model, lr="auto", eps="auto")
    losses = []
    for _ in range(6):
        losses.append(float(steps.step(objectives.LanguageModelLoss(model), batch(0))))
    assert {c.name.split(".")[-2] for c in guided_coordinates(steps)} == {"c_proj"}
    assert losses[-1] < 0.9 * losses[0]


def test_a_guided_phase_trains_its_layers_within_the_projection():
    model = tiny_llama()
    steps = optimizer(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, steps, 0, INTERVAL)
    guides = {c.name: (c.p.clone(), c.v.clone()) for c in guided_coordinates(steps)}
    steps.flush_updates()
    assert len(guides) == 4
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - before[name]
        if name not in guides:
            assert not moved.any(), name
            continue
        p, v = guides[name]
        assert float(moved.norm()) > 0
        inside = p @ torch.linalg.lstsq(p, moved).solution
        inside = (torch.linalg.lstsq(v, inside.T).solution.T) @ v.T
        assert torch.allclose(inside, moved, atol=1e-5 + 1e-3 * float(moved.abs().max())), name


def test_a_run_through_guided_turns_replays_without_the_data(tmp_path):
    model = tiny_llama()
    method = methods.lozo_g(interval=INTERVAL, examples=48, eps="auto")
    steps = ZerothOrder(model, method, lr="auto", sample_batches=examples, journal=tmp_path / "journal.zo")
    run(model, steps, 0, 3 * INTERVAL + 1)
    steps.journal.close()
    fresh = tiny_llama()
    replay(fresh, Journal.open(tmp_path / "journal.zo"))
    assert same_weights(weights(fresh), weights(model))


@pytest.mark.parametrize("rate", ["auto", 1e-2])
@pytest.mark.parametrize("at", [INTERVAL, INTERVAL + 1, 2 * INTERVAL, 3 * INTERVAL + 1])
def test_a_run_goes_on_bit_for_bit_from_any_turn(at, rate):
    """The optimizer's state and the weights, in the middle of a turn of either kind and at its end; every second is LOZO's."""
    options = {"lr": rate, "eps": "auto", "layer_scales": False}
    straight = tiny_llama()
    seen, steps = [], optimizer(straight, **options)
    steps.output_gradients.limit_phases(1, 1)
    for step in range(4 * INTERVAL):
        run(straight, steps, step, step + 1)
        seen.append(steps.run.along_output_gradients)
    assert seen == ([True] * INTERVAL + [False] * INTERVAL) * 2
    model = tiny_llama()
    first = optimizer(model, **options)
    first.output_gradients.limit_phases(1, 1)
    run(model, first, 0, at)
    kept, stored = first.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    resumed = tiny_llama(seed=1)
    resumed.load_state_dict(stored)
    second = optimizer(resumed, **options)
    second.output_gradients.limit_phases(1, 1)
    second.load_state_dict(kept)
    run(resumed, second, at, 4 * INTERVAL)
    assert same_weights(weights(resumed), weights(straight))


def test_begin_delays_guided_phases_and_guide_sets_their_rank():
    model = tiny_llama()
    steps, seen = optimizer(model, lr=1e-3, begin=2, rank=1, guide=3), []
    steps.output_gradients.limit_phases(1)
    for step in range(4 * INTERVAL):
        run(model, steps, step, step + 1)
        seen.append({tuple(c.p.shape[1:]) + tuple(c.v.shape[1:]) for c in guided_coordinates(steps)})
    assert seen == [set()] * 2 * INTERVAL + [{(3, 3)}] * INTERVAL + [set()] * INTERVAL
    assert all(c.v.shape[1] == 1 and not c.guided for c in steps.forward.coordinates if isinstance(c, GuidedCoordinate))


def test_a_loss_that_tells_no_errors_has_lozos_turns_only():
    model = tiny_llama()
    steps = optimizer(model, layer_scales=False)
    for _ in range(2 * INTERVAL):
        steps.step(lambda data: model(data["input_ids"]).logits.square().mean(dim=(1, 2)), batch(0))
        assert not steps.run.along_output_gradients
        assert all(bool(c.v.any()) for c in steps.forward.coordinates if isinstance(c, GuidedCoordinate))
    assert steps.sequences_evaluated == 2 * INTERVAL * 4 * 8 + 2 * 16  # it was asked once a turn, for the first of the examples


def test_where_no_layer_could_be_guided_nothing_is_looked_at():
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    steps = optimizer(model, layer_scales=False)
    run(model, steps, 0, INTERVAL + 1)
    assert steps.sequences_evaluated == (INTERVAL + 1) * 4 * 8 and not steps.run.along_output_gradients


def test_looking_at_examples_is_counted_and_writes_nothing():
    model = tiny_llama()
    asked = []

    def counted(step: int, count: int) -> list[dict[str, torch.Tensor]]:
        asked.append((step, count))
        return examples(step, count)

    steps = ZerothOrder(model, methods.lozo_g(interval=INTERVAL, rank=2, guide=2, examples=48), lr=0.0, sample_batches=counted)
    run(model, steps, 0, INTERVAL)
    before, counted, state = weights(model), steps.sequences_evaluated, torch.get_rng_state()
    run(model, steps, INTERVAL, INTERVAL + 1)
    assert asked == [(0, 48), (INTERVAL, 48)]
    assert steps.sequences_evaluated - counted == 48 + 3 * 8  # the step, and the losses on either side of it, where a turn begins
    run(model, steps, INTERVAL + 1, INTERVAL + 2)
    assert steps.sequences_evaluated - counted == 48 + 4 * 8
    assert same_weights(weights(model), before) and torch.equal(torch.get_rng_state(), state)


def test_a_trainer_samples_the_same_examples_whenever_asked(tmp_path):
    made = ZOTrainer(model=tiny_llama(), args=config(tmp_path, method="lozo-g"), train_dataset=ROWS, data_collator=collate_completions)
    state = torch.get_rng_state()
    first, again, other = made._sample_batches(15, 40), made._sample_batches(15, 40), made._sample_batches(45, 40)
    assert torch.equal(torch.get_rng_state(), state)
    ids = [torch.cat([one["input_ids"] for one in found]) for found in (first, again, other)]
    assert ids[0].shape[0] == 40 and torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    assert len(ids[0].unique(dim=0)) == 40


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"per_device_train_batch_size": 16}, 30),
        ({"per_device_train_batch_size": 32}, 30),
        ({"per_device_train_batch_size": 4}, 120),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 60),
        ({"per_device_train_batch_size": 4, "interval": 7}, 7),
        ({"per_device_train_batch_size": 4, "method_args": {"examples": 32}}, 30),
    ],
)
def test_a_trainer_makes_turns_longer_where_batches_are_small(tmp_path, options, steps):
    made = ZOTrainer(
        model=tiny_llama(), args=config(tmp_path, method="lozo-g", **options), train_dataset=ROWS, data_collator=collate_completions
    )
    assert made._method().subspace.interval == steps
    made.objective = lambda model, batch: batch["input_ids"].float().mean(dim=1)  # tells nothing, so that every turn is LOZO's
    assert made._method().subspace.interval == options.get("interval", 30)


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


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="examples must be a whole number"):
        methods.lozo_g(examples=0)
    with pytest.raises(ValueError, match="begin must be a whole number of at least 0"):
        methods.lozo_g(begin=-1)


@pytest.mark.parametrize("rate", ["auto", 1e-2])
def test_a_killed_run_goes_on_from_its_journal_bit_for_bit(tmp_path, rate):
    """From the last record of all that is known of turns and scales, whatever was written after it."""
    straight = tiny_llama()
    steps = ZerothOrder(
        straight,
        methods.lozo_g(interval=INTERVAL, guide=2, examples=48, eps="auto"),
        lr=rate,
        sample_batches=examples,
        journal=tmp_path / "j.zo",
    )
    steps.preparation.state_every = 4
    run(straight, steps, 0, 9)
    steps.journal.close()
    records = list(Journal.open(tmp_path / "j.zo").records())
    cut = next(place for place, record in enumerate(records) if isinstance(record, StepRecord) and record.step == 6) + 1
    model = tiny_llama()
    resumed = ZerothOrder(model, methods.lozo_g(interval=INTERVAL, guide=2, examples=48, eps="auto"), lr=rate, sample_batches=examples)
    resumed.fast_forward(records[: resuming.retaken(resumed, records[:cut])])
    run(model, resumed, 0, 9)
    assert same_weights(weights(model), weights(straight))


def test_what_a_step_goes_along_is_computed_once_and_again_where_its_mean_has_moved():
    coordinate = GuidedCoordinate("w", torch.nn.Parameter(torch.zeros(6, 5)), 2, 10, 2, 0, momentum=0.5)
    one, two = torch.tensor([1.0, 2.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    first = coordinate.step_direction(one)
    assert coordinate.step_direction(one.clone()) is first
    assert torch.equal(first, polar(0.5 * one.view(2, 2)).flatten())
    assert not torch.equal(coordinate.step_direction(two), first)
    coordinate.step_direction(one)
    coordinate.advance(two)
    moved = coordinate.step_direction(one)
    assert torch.allclose(moved, polar(0.25 * two.view(2, 2) + 0.5 * one.view(2, 2)).flatten()) and not torch.allclose(moved, first)
    coordinate.moment.zero_()
    assert torch.equal(coordinate.step_direction(one), first)
