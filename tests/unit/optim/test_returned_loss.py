"""Output gradients are used only where they are those of the loss that is returned, of logits that the head gave, for residual layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from guided_runs import INTERVAL, ROWS, batch, examples, guided_coordinates, optimizer
from toy_decoders import Decoder
from trainer_cases import collate_choices, same_weights, tiny_llama, weights
from zotune import ZerothOrder, methods, objectives, replay
from zotune.optim.journal import Journal
from zotune.optim.state import StepContext

Transform = Callable[[Tensor], Tensor]
WEIGHTS = torch.tensor([0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 0.0, 0.1])
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])


def repeated(values: Tensor, losses: Tensor) -> Tensor:
    return values.repeat(len(losses) // len(values))


FOLLOWED: dict[str, Transform] = {
    "itself": lambda losses: losses,
    "mean": lambda losses: losses.mean(),
    "half of the mean": lambda losses: losses.mean() / 2,
    "minus the mean": lambda losses: -losses.mean(),
    "a number": lambda losses: torch.tensor(float(losses.mean())),
    "weights": lambda losses: repeated(WEIGHTS, losses) * losses,
    "normalized weights": lambda losses: losses * repeated(WEIGHTS, losses) / repeated(WEIGHTS, losses).mean(),
    "advantages": lambda losses: repeated(SIGNS, losses) * losses,
    "minus": lambda losses: -losses,
    "selected": lambda losses: torch.where(repeated(SIGNS, losses) > 0, losses, torch.zeros_like(losses)),
}
NOT_FOLLOWED: dict[str, Transform] = {
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "power of a weight": lambda losses: losses * torch.exp(-losses),
    "pairs": lambda losses: -torch.nn.functional.logsigmoid(losses[::2] - losses[1::2]),
    "margin": lambda losses: (losses - 1).clamp(min=0),
    "centered": lambda losses: losses - losses.mean(),
    "sorted": lambda losses: losses.sort().values,
    "reversed": lambda losses: losses.flip(0),
    "weighted mean": lambda losses: (losses * repeated(WEIGHTS, losses)).mean(),
    "largest": lambda losses: losses.max(),
    "bonus": lambda losses: losses + 0.5,
    "means of pairs": lambda losses: losses.view(-1, 2).mean(dim=1),
    "numbers of another function": lambda losses: torch.tensor([value**0.5 for value in losses.tolist()]),
}


def without_last_norm() -> nn.Module:
    """A model whose output gradients are exact in its last layer."""
    model = tiny_llama()
    model.model.norm = nn.Identity()
    return model


def begun(model: nn.Module, loss_fn, **options) -> tuple[ZerothOrder, list[str]]:
    """An optimizer at the start of a phase, nothing trained, and what it warned of."""
    steps = optimizer(model, **{"lr": 0.0, "layer_scales": False, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            steps.step(loss_fn, batch(step))
    return steps, [str(one.message) for one in caught if "output gradients" in str(one.message) or "residual" in str(one.message)]


@pytest.mark.parametrize("name", FOLLOWED)
def test_coefficients_are_the_gradient_of_the_returned_loss(name):
    model = without_last_norm()
    loss_fn = lambda data: FOLLOWED[name](objectives.LanguageModelLoss(model)(data))  # noqa: E731
    steps, said = begun(model, loss_fn)
    assert steps.run.along_output_gradients and not said
    (last,) = [c for c in guided_coordinates(steps) if c.name == "model.layers.1.mlp.down_proj.weight"]
    with torch.no_grad():
        found = steps.output_gradients.derivatives(StepContext(0, 1, loss_fn, [batch(1)]))
    returned = FOLLOWED["mean" if name == "a number" else name](objectives.LanguageModelLoss(model)(batch(1)))
    (gradient,) = torch.autograd.grad(returned.mean(), [last.parameter])
    wanted = (last.p.T @ gradient @ last.v).flatten()
    assert torch.allclose(found.slopes[-last.num_guided :].mean(dim=1), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert torch.allclose(found.losses.mean(), returned.mean())


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_another_function_of_the_losses_has_drawn_directions(name):
    model = tiny_llama()
    loss_fn = lambda data: NOT_FOLLOWED[name](objectives.LanguageModelLoss(model)(data))  # noqa: E731
    options = {} if NOT_FOLLOWED[name](torch.rand(8)).shape == (8,) else {"directions_per": "batch"}
    steps, said = begun(model, loss_fn, **options)
    assert not steps.run.along_output_gradients
    assert len(said) == 1 and "the loss returned is neither" in said[0]


def with_a_penalty(model: nn.Module, data) -> Tensor:
    return objectives.LanguageModelLoss(model)(data) + 1e-2 * model.lm_head.weight.square().sum()


def with_weights_of_the_model(model: nn.Module, data) -> Tensor:
    probability = model(data["input_ids"]).logits[:, -1].softmax(dim=1).amax(dim=1)
    return objectives.LanguageModelLoss(model)(data) * probability


def with_weights_of_its_own(model: nn.Module, data) -> Tensor:
    losses = objectives.LanguageModelLoss(model)(data)
    return losses * losses.detach()


def below_a_reference(model: nn.Module, data) -> Tensor:
    return objectives.LanguageModelLoss(model)(data) - objectives.LanguageModelLoss(REFERENCE)(data)


def of_two_texts(model: nn.Module, data) -> Tensor:
    other = {**data, "input_ids": data["input_ids"].flip(0)}
    return objectives.LanguageModelLoss(model)(data) + objectives.LanguageModelLoss(model)(other)


REFERENCE = tiny_llama(seed=1)


@pytest.mark.parametrize("loss", [with_a_penalty, with_weights_of_the_model, with_weights_of_its_own, below_a_reference, of_two_texts])
def test_a_loss_beyond_the_recorded_one_has_drawn_directions(loss):
    model = tiny_llama()
    steps, said = begun(model, lambda data: loss(model, data))
    assert not steps.run.along_output_gradients and len(said) == 1


def test_choices_with_weights_are_followed_too():
    model = without_last_norm()
    rows = [collate_choices([row]) for row in ROWS[:8]]
    data = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    loss_fn = lambda given: WEIGHTS * objectives.ChoiceLoss(model)(given)  # noqa: E731
    steps = ZerothOrder(model, methods.lozo_g(interval=2, guide=2), lr=0.0)
    steps.step(loss_fn, data)
    assert steps.run.along_output_gradients
    last = guided_coordinates(steps)[-1]
    with torch.no_grad():
        slopes = steps.output_gradients.derivatives(StepContext(0, 1, loss_fn, [data])).slopes[-last.num_guided :]
    (gradient,) = torch.autograd.grad(loss_fn(data).mean(), [last.parameter])
    wanted = (last.p.T @ gradient @ last.v).flatten()
    assert torch.allclose(slopes.mean(dim=1), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_a_batch_with_another_loss_ends_the_phase():
    model = tiny_llama()
    steps, _ = begun(model, objectives.LanguageModelLoss(model), interval=3)
    assert steps.run.along_output_gradients
    with pytest.warns(UserWarning, match="no constant multiple of the recorded one"):
        steps.step(lambda data: torch.sigmoid(objectives.LanguageModelLoss(model)(data)), batch(2))
    assert not steps.last_report.coefficients.any()
    assert steps.output_gradients.state()["lost"]
    steps.step(objectives.LanguageModelLoss(model), batch(3))
    assert not steps.run.along_output_gradients


# -- the head ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "used"),
    [({}, True), ({"scale": 0.25}, True), ({"cap": 3.0}, False), ({"cap": 3.0, "width": 64}, False), ({"scale": -1.0}, False)],
)
def test_logits_are_the_heads_output_up_to_a_factor(options, used):
    model = Decoder(enlarge=2.0, **options)
    steps, said = begun(model, objectives.LanguageModelLoss(model))
    assert steps.run.along_output_gradients is used
    assert used or (len(said) == 1 and "soft cap" in said[0])


# -- the residual stream ----------------------------------------------------------------------------------------------------------------


def test_queries_of_cross_attention_are_not_guided(tmp_path):
    """Checked once a run; a replay, and a run that goes on from its state, know it from the journal and the state."""
    model = Decoder(cross=True)
    method = methods.lozo_g(interval=INTERVAL, rank=2, guide=2, examples=48, layer_scales=False)
    journal = tmp_path / "j.zo"
    steps = ZerothOrder(model, method, lr=1e-3, sample_batches=examples, journal=journal)
    with pytest.warns(UserWarning, match="2 layers do not write to the residual stream, such as blocks.0.cross.query.weight"):
        steps.step(objectives.LanguageModelLoss(model), batch(0))
    wanted = {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in ("attention.out", "cross.out", "down")}
    assert {c.name for c in guided_coordinates(steps)} == wanted
    state, kept = copy.deepcopy(steps.state_dict()), weights(model)
    for step in range(1, 2 * INTERVAL + 1):
        steps.step(objectives.LanguageModelLoss(model), batch(step))
    steps.journal.close()
    events = [record for record in Journal.open(journal).records() if isinstance(record, dict) and record["event"] == "residual"]
    assert [event["rejected"] for event in events] == [["blocks.0.cross.query.weight", "blocks.1.cross.query.weight"]]
    fresh = Decoder(cross=True)
    replay(fresh, journal)
    assert same_weights(weights(fresh), weights(model))
    other = Decoder(cross=True)
    other.load_state_dict(kept)
    resumed = ZerothOrder(other, method, lr=1e-3, sample_batches=examples)
    resumed.load_state_dict(state)
    for step in range(1, 2 * INTERVAL + 1):
        resumed.step(objectives.LanguageModelLoss(other), batch(step))
    assert same_weights(weights(other), weights(model)) and resumed.sequences_evaluated == steps.sequences_evaluated


def test_norms_after_the_sum_leave_no_common_stream():
    model = Decoder(post_norm=True, enlarge=4.0)
    steps, said = begun(model, objectives.LanguageModelLoss(model))
    assert not steps.run.along_output_gradients and len(said) == 1


def test_a_head_as_wide_as_the_stream_is_not_guided():
    model = Decoder(width=100)
    steps, said = begun(model, objectives.LanguageModelLoss(model))
    assert {c.name for c in guided_coordinates(steps)} == {f"blocks.{b}.{x}.weight" for b in range(2) for x in ("attention.out", "down")}
    assert not said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_of_a_pre_norm_decoder_are_guided(dtype):
    model = tiny_llama(dtype=dtype)
    steps = optimizer(model, lr=0.0)
    steps.step(objectives.LanguageModelLoss(model), batch(0))
    assert len(guided_coordinates(steps)) == 4 and steps.output_gradients.rejected == []
    assert steps.sequences_evaluated == 48 + 3 * 16 + 8 + 2 * 8  # examples; the check; the step; the slope
