"""Training in llama.cpp takes torch's steps, or is refused before the first."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_models import Pair, choice_batch, text_batch
from zotune import ZerothOrder, methods, objectives
from zotune.engines.model import EngineModel
from zotune.methods import Method
from zotune.optim.output_gradient_steps import ROUNDED

STEPS = 5
TRAINED = ["agzo", "lozo", "lozo-e", "lozo-g", "lozo-m", "subzero", "zo-act"]


def short(name: str, **options: object) -> Method:
    """A method with one ε, that redraws every two steps."""
    if name == "lozo-g":
        options = {"guide": 2, "examples": 8, **options}
    if "interval" in methods.options(name):
        options = {"interval": 2, **options}
    return dataclasses.replace(methods.get(name, **options), eps=1e-2)


def batch(step: int, kind: str = "text") -> dict[str, Tensor]:
    """Texts of one length: in torch, inputs of padding are inputs."""
    return text_batch([8] * 4, seed=step) if kind == "text" else choice_batch([5, 9, 12, 7], seed=step)


def run(model: torch.nn.Module, method: Method, kind: str = "text", **options: object) -> tuple[ZerothOrder, list[Tensor], Tensor]:
    """(optimizer, coefficients of each step, losses)."""
    optimizer = ZerothOrder(model, method, **{"lr": 3e-3, "seed": 1, **options})
    loss = objectives.LanguageModelLoss(model) if kind == "text" else objectives.ChoiceLoss(model)
    losses, coefficients = [], []
    for step in range(STEPS):
        losses.append(float(optimizer.step(loss, batch(step, kind))))
        coefficients.append(torch.as_tensor(optimizer.last_report.coefficients).float())
    return optimizer, coefficients, torch.tensor(losses)


def check_same(pair: Pair, model: EngineModel, method: Method, kind: str = "text", within: float = 1e-3, **options: object) -> None:
    copy = pair.fresh()
    before = {name: parameter.detach().clone() for name, parameter in copy.named_parameters()}
    _, found, losses = run(model, method, kind, **options)
    optimizer, expected, reference = run(copy, method, kind, **options)
    torch.testing.assert_close(losses, reference, rtol=1e-4, atol=1e-4)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape, step
        assert float((one - other).abs().max()) <= within * float(other.abs().max()), step
    optimizer.remove_hooks()
    factors, moved = model.factors(), 0
    for name, parameter in copy.named_parameters():
        change = parameter.detach() - before[name]
        if not change.any():
            continue
        moved += 1
        left, right = factors[name.removesuffix(".weight")]
        assert float((left @ right.T - change).norm()) <= max(within, 2e-3) * float(change.norm()), name
    assert moved


@pytest.mark.parametrize("name", methods.names())
def test_a_method_takes_torchs_steps_or_is_refused(llama: Pair, model: EngineModel, name: str) -> None:
    if name not in TRAINED:
        with pytest.raises(
            ValueError, match=rf"^{name} writes the weights themselves, and an engine only reads its file: use one [^.]*\.$"
        ):
            ZerothOrder(model, name, lr=1e-3)
        assert all(layer.product is None for layer in model.matrices.values())
        ZerothOrder(model, "lozo", lr=1e-3)  # which a refusal does not prevent
        return
    within = 3e-2 if name == "lozo-g" else 1e-3  # its V, P and coefficients are rounded to few bits
    check_same(llama, model, short(name), within=within)


@pytest.mark.parametrize("name", ["lozo", "subzero", "lozo-g"])
def test_choices_with_padding_take_torchs_steps(llama: Pair, model: EngineModel, name: str) -> None:
    check_same(llama, model, short(name), "choices", within=3e-2 if name == "lozo-g" else 1e-3)


def test_phases_of_both_kinds_take_torchs_steps(llama: Pair, model: EngineModel) -> None:
    check_same(llama, model, short("lozo-g", begin=1), within=3e-2)


@pytest.mark.parametrize(
    "changes",
    [{"update_rule": "AdamW"}, {"num_directions": 3}, {"estimator": "forward"}, {"directions_per": "example"}, {"rank": 3}],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_variants_of_lozo_take_torchs_steps(llama: Pair, model: EngineModel, changes: dict[str, object]) -> None:
    rank = {"rank": changes.pop("rank")} if "rank" in changes else {}
    check_same(llama, model, dataclasses.replace(short("lozo", **rank), **changes))


def test_an_adapter_decays_as_weights_do_toward_their_anchor(llama: Pair, model: EngineModel) -> None:
    check_same(llama, model, short("lozo"), anchor_decay=50.0)


def test_biases_and_tied_heads_are_no_obstacle(qwen2: Pair, opened) -> None:
    check_same(qwen2, opened(qwen2), short("lozo"))


def test_a_measured_rate_equals_torchs(llama: Pair, model: EngineModel) -> None:
    check_same(llama, model, short("lozo"), within=5e-3, lr="auto")


def test_a_measured_eps_clears_the_rounding_of_8_bits(llama_q8: Pair, opened) -> None:
    exact = ZerothOrder(llama_q8.fresh(), method := dataclasses.replace(methods.lozo(), eps="auto"), lr=1e-3)
    rounded = ZerothOrder(model := opened(llama_q8), method, lr=1e-3)
    for optimizer, subject in ((exact, exact.forward.model), (rounded, model)):
        optimizer.step(objectives.LanguageModelLoss(subject), batch(0))
    assert rounded.eps > 2 * exact.eps
    (expected,), (found,) = exact.last_report.coefficients, rounded.last_report.coefficients
    assert float(found) == pytest.approx(float(expected), rel=0.25)


@pytest.mark.parametrize("rounds", [False, True], ids=["f32", "q8_0"])
def test_slopes_are_measured_beyond_the_rounding(llama: Pair, llama_q8: Pair, opened, rounds: bool) -> None:
    model = opened(llama_q8 if rounds else llama)
    optimizer, loss = ZerothOrder(model, short("lozo-g"), lr="auto", seed=1), objectives.LanguageModelLoss(model)
    for step in range(2):
        optimizer.step(loss, batch(step))
    gradients = optimizer.output_gradients
    gradients.distance.value, gradients.scale.count = 1e-6, 0  # steps have become short, and a measurement is due
    distances: list[float] = []
    sample_at = gradients.size.sample_at
    gradients.size.sample_at = lambda radius: (distances.append(radius), sample_at(radius))[1]
    optimizer.step(loss, batch(2))
    assert (min(distances) >= ROUNDED) == rounds


def test_an_eps_within_the_rounding_is_warned_of(llama: Pair, llama_q8: Pair, opened) -> None:
    method = dataclasses.replace(methods.lozo(), eps=1e-5)
    with pytest.warns(UserWarning, match=r"coefficients at eps=1e-05 and at 2e-05 differ by \d+%: the engine's rounding"):
        ZerothOrder(model := opened(llama_q8), method, lr=1e-3).step(objectives.LanguageModelLoss(model), batch(0))
    method = dataclasses.replace(methods.lozo(), eps=1e-2)  # warnings are errors
    ZerothOrder(model := opened(llama), method, lr=1e-3).step(objectives.LanguageModelLoss(model), batch(0))


# -- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.1}, r"^weight decay shrinks the weights themselves, which an engine only reads: set weight_decay=0\.$"),
        ({"forward_batching": "batched"}, r"^an engine evaluates one point at a time: leave forward_batching at 'auto'\.$"),
    ],
)
def test_options_that_an_engine_has_not_are_refused_at_once(model: EngineModel, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZerothOrder(model, short("lozo"), lr=1e-3, **options)
    assert all(layer.product is None for layer in model.matrices.values())


def test_a_second_optimizer_waits_for_the_first(model: EngineModel) -> None:
    first = ZerothOrder(model, short("lozo"), lr=1e-3)
    with pytest.raises(ValueError, match="already trained by another ZerothOrder"):
        ZerothOrder(model, short("lozo"), lr=1e-3)
    first.remove_hooks()
    ZerothOrder(model, short("lozo"), lr=1e-3)
