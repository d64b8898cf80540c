"""PseuZO: the slopes of a window of directions from output gradients, and what the journal keeps of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import toys
from guided_runs import batch
from trainer_cases import tiny_llama
from zotune import ZerothOrder, methods, objectives, replay
from zotune.methods.output_window import OutputWindow
from zotune.optim.journal_records import StepRecord
from zotune.optim.output_window import WindowTransform, behind_states, states_width
from zotune.rng.directions import Directions, Key

EPS, LR = 1e-3, 1e-2


def optimizer(model: nn.Module, **options) -> ZerothOrder:
    journal = options.pop("journal", None)
    return ZerothOrder(model, methods.pseuzo(eps=EPS, **options), lr=LR, journal=journal)


def step(model: nn.Module, steps: ZerothOrder, number: int) -> float:
    return float(steps.step(objectives.LanguageModelLoss(model), batch(number, 4)))


def run(model: nn.Module, steps: ZerothOrder, first: int, last: int) -> list[float]:
    return [step(model, steps, number) for number in range(first, last)]


def outputs(model: nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(o, δ) at the one scored position of each example, by hooks and backprop."""
    states: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, __: states.append(args[0]))
    with torch.enable_grad():
        losses = objectives.LanguageModelLoss(model)(data)
        (gradient,) = torch.autograd.grad(losses.sum(), states[-1])
    handle.remove()
    place = torch.arange(len(losses)), data["positions"][:, 0]
    if gradient.shape[1] == 1:  # the head is called at scored positions alone
        place = torch.arange(len(losses)), torch.zeros(len(losses), dtype=torch.long)
    return states[-1].detach()[place].double(), gradient[place].double()


def test_a_step_is_its_equation(tmp_path):
    """c_j = λ^(t−j) ⟨Δ_j, δ_t⟩ / ε: of the step by example, of the window by means; and the first is the slope by backprop."""
    model = tiny_llama()
    steps, differences = optimizer(model, window=3, epoch=2, cycle=50, journal=tmp_path / "j"), []
    for number in range(4):
        data, start = batch(number, 4), copy.deepcopy(model)
        z = [
            {name: Directions("gaussian").draw(Key(0, past, 0, name), p.shape) for name, p in model.named_parameters()}
            for past in range(max(0, number - 2), number + 1)
        ]
        moved = copy.deepcopy(start)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(z[-1][name], alpha=EPS)
        (here, delta), (there, _) = outputs(start, data), outputs(moved, data)
        decay = 1.0 if number < 2 else 1 / 11
        means = [each.bfloat16().double() for each in differences[-2:]]
        expected = [decay ** (len(means) - place) * float(each @ delta.mean(dim=0)) / EPS for place, each in enumerate(means)]
        expected.append(float(((there - here) * delta).sum(dim=1).mean()) / EPS)
        differences.append((there - here).mean(dim=0))
        step(model, steps, number)
        (*_, record) = (record for record in steps.journal.records() if isinstance(record, StepRecord))
        found = [past.coefficients[0] for past in steps.run.transform(WindowTransform).past]
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-3 * abs(expected[-1]))
        assert len(record.coefficients) == len(found) + 1 + 32  # the head's input has 32 elements
        plain = record.coefficients[len(found)]
        if not number:  # the slope, up to curvature, which later steps meet more of
            with torch.enable_grad():
                slopes = torch.autograd.grad(objectives.LanguageModelLoss(start)(data).mean(), list(start.parameters()))
            along = [float((g * z[-1][name]).sum()) for (name, _), g in zip(start.named_parameters(), slopes, strict=True)]
            assert found[-1] == pytest.approx(sum(along) - along[-1], rel=0.1)  # the last is the head's
        losses = [objectives.LanguageModelLoss(each)(data).detach().double().mean() for each in (moved, start)]
        assert plain == pytest.approx(float(losses[0] - losses[1]) / EPS, rel=1e-2, abs=1e-2)
        for name, p in start.named_parameters():
            weights = [0.0] * (len(found) - 1) + [plain] if name == "lm_head.weight" else found
            value = p.detach() - LR * sum(c * each[name] for c, each in zip(weights, z, strict=True))
            assert torch.allclose(model.get_parameter(name), value, atol=1e-5)
    assert steps.forward_passes == 8 and steps.sequences_evaluated == 32


def test_a_window_of_one_is_the_difference_for_small_steps():
    """⟨o(θ + εZ) − o(θ), δ⟩ / ε and (L(θ + εZ) − L(θ)) / ε, of every direction."""
    found = []
    for options in ({"window": 1}, {"cycle": 1000, "epoch": 1}):
        model = tiny_llama()
        model.lm_head.requires_grad_(False)
        steps = optimizer(model, num_directions=3, **options)
        if "epoch" in options:
            steps.run.transform(WindowTransform).without = True
        step(model, steps, 0)
        found.append(steps.last_report.coefficients)
    assert torch.allclose(*found, rtol=5e-2, atol=2e-2) and not torch.equal(*found)


def test_runs_resume_and_replay_within_a_window_bit_for_bit(tmp_path):
    """From a saved state and along a journal, through steps without a window and a new cycle."""
    options = {"window": 3, "epoch": 1, "cycle": 13, "num_directions": 2}
    build = lambda: tiny_llama().bfloat16()  # noqa: E731
    straight = optimizer(model := build(), journal=tmp_path / "j", **options)
    losses = run(model, straight, 0, 15)
    halted = optimizer(half := build(), **options)
    run(half, halted, 0, 7)
    resumed = optimizer(again := build(), **options)
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    resumed.load_state_dict(copy.deepcopy(halted.state_dict()))
    assert run(again, resumed, 7, 15) == losses[7:]
    along = optimizer(forth := build(), **options)
    along.fast_forward([record for record in straight.journal.records() if not isinstance(record, StepRecord) or record.step < 8])
    assert run(forth, along, 0, 15) == losses
    replayed = replay(rebuilt := build(), tmp_path / "j")
    for other, others in ((again, resumed), (forth, along), (rebuilt, replayed)):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        mine, theirs = straight.run.transform(WindowTransform), others.run.transform(WindowTransform)
        assert mine.state() == theirs.state() and torch.equal(mine.tensors()["differences"], theirs.tensors()["differences"])
    assert straight.forward_passes == resumed.forward_passes == along.forward_passes == 45


@pytest.mark.filterwarnings("ignore:the loss returned is neither")
def test_without_output_gradients_a_step_is_a_forward_difference():
    """Of losses that are several recorded ones, and of one that records nothing."""
    for make in (
        lambda model: lambda data: objectives.LanguageModelLoss(model)(data).cumsum(0),
        lambda model: lambda data: plain(model, data),
    ):
        found = []
        for method in (methods.pseuzo(eps=EPS), methods.mezo(estimator="forward", eps=EPS)):
            model = tiny_llama()
            steps = ZerothOrder(model, method, lr=1e-4, forward_batching="sequential")
            for number in range(2):
                steps.step(make(model), batch(number, 4))
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.allclose(*found, atol=1e-5)


def plain(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits.float()
    return logits.square().mean(dim=(1, 2))


def test_a_loss_that_is_not_finite_moves_nothing():
    steps = optimizer(model := tiny_llama())
    step(model, steps, 0)
    before, window = copy.deepcopy(model.state_dict()), steps.run.transform(WindowTransform)
    steps.step(lambda data: objectives.LanguageModelLoss(model)(data) * math.nan, batch(1, 4))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and window.steps == [0]
    step(model, steps, 2)
    assert window.steps == [0, 2] and len(window.past) == 2


def test_what_is_behind_the_hidden_states():
    """A head of its own, and the head of a masked language model but for the embedding; of a tied head nothing."""
    assert behind_states(tiny_llama()) == {"lm_head.weight"} and not behind_states(toys.transformer("gpt2"))
    found = behind_states(bert := toys.transformer("bert"))
    assert states_width(bert) == states_width(tiny_llama()) == 32 and states_width(toys.classifier()) == 0
    assert {"cls.predictions.bias", "cls.predictions.transform.dense.weight"} < found and not any("embeddings" in name for name in found)


def test_the_schedule_of_a_cycle():
    window = OutputWindow(length=2, epoch=2, cycle=30)
    assert [window.decay(step) for step in (0, 1, 2, 21, 22, 29, 30)] == [1.0, 1.0, 1 / 11, 1 / 101, 0.0, 0.0, 1.0]
    assert [step for step in range(61) if window.begins(step)] == [0, 30, 60]
    with pytest.raises(ValueError, match="window must be a whole number of at least 1"):
        methods.pseuzo(window=0)
