"""First-order baselines: they learn, keep what they say, resume bit for bit, and are what their equations say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zotune
from trainer_cases import StopAt, choice_rows, config, losses, same_weights, tiny_llama, trainer, weights
from zotune import baselines
from zotune.baselines import FirstOrder, catalog, optimizer_class
from zotune.baselines.galore import random_frame
from zotune.baselines.mkor import updated_inverse
from zotune.baselines.scale import column_normalized
from zotune.rng.directions import Key
from zotune.weights.structure import last_layer

pytest.importorskip("pytorch_optimizer")

TRAINED = [name for name in baselines.names() if baselines.get(name).kind == "backward"]
every_baseline = pytest.mark.parametrize("name", TRAINED)
RATES = {"fo-sgd": 5e-2, "sgd-sai": 2e-3, "adahessian": 2e-2}


def baseline(name: str) -> baselines.Baseline:
    small = {"rank": 2, "interval": 7} if "rank" in baselines.options_of(name) else {}
    if name.startswith("mkor"):
        small = {"interval": 3}
    if name == "mkor-h":
        small["window"] = 5
    if name == "hybrid":
        small["zo_lr"] = 1e-3
    return baselines.get(name, **small)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).to(dtype)


def problem(rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 12, generator=generator)
    return x, x @ torch.randn(12, 6, generator=generator)


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    dtype = next(model.parameters()).dtype
    return lambda batch: (model(batch[0].to(dtype)).float() - batch[1]).square().mean(dim=1)


def build(model: nn.Module, method: baselines.Baseline, **options: Any) -> FirstOrder:
    return optimizer_class(method)(model, method, **options)


def run(optimizer: FirstOrder, steps: int) -> list[float]:
    data, loss = problem(), loss_of(optimizer.model)
    return [float(optimizer.step(loss, data)) for _ in range(steps)]


# -- each of them -----------------------------------------------------------------------------------------------------------------------


@every_baseline
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_baseline_learns_and_keeps_no_more_than_it_says(name: str, dtype: torch.dtype) -> None:
    model, method = net(dtype), baseline(name)
    optimizer = build(model, method, lr=RATES.get(name, 1e-2), max_steps=60)
    seen = run(optimizer, 60)
    assert seen[-1] < 0.75 * seen[0]
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    declared = method.state_bytes(shapes, last=frozenset(last_layer(model)), half=dtype is torch.bfloat16, deep=list(optimizer.parameters))
    tensors = optimizer.state_dict()["state"]
    kept = sum(t.numel() * t.element_size() for key, t in tensors.items() if "|step|" not in key)
    if name == "mkor-h":  # it has gone over to first order and let its factors go
        assert kept <= declared
    else:
        assert kept == declared
    assert all(p.grad is None for p in [*model.parameters(), *optimizer.masters.values()])
    assert optimizer.forward_passes == 60 * optimizer.passes <= 60 * method.forwards_per_step
    assert optimizer.sequences_evaluated == 64 * optimizer.forward_passes


@every_baseline
def test_the_state_goes_through_json_and_continues_bit_for_bit(name: str) -> None:
    options: dict[str, Any] = {"lr": RATES.get(name, 1e-2), "max_steps": 24, "seed": 5}
    straight = build(net(), baseline(name), **options)
    expected = run(straight, 24)
    first = build(net(), baseline(name), **options)
    begun = run(first, 11)
    state = first.state_dict()
    tensors = {key: tensor.clone() for key, tensor in state.pop("state").items()}
    model = net()
    model.load_state_dict(first.model.state_dict())
    second = build(model, baseline(name), **options)
    second.load_state_dict({"state": tensors, **json.loads(json.dumps(state))})
    assert begun + run(second, 13) == expected
    assert same_weights(weights(straight.model), weights(model))
    assert second.steps == 24 and second.forward_passes == straight.forward_passes


@pytest.mark.parametrize("name", ["fo-adamw", "adahessian", "scale", "golore", "mkor-h", "hybrid"])
def test_a_trainers_run_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    common = {"max_steps": 7, "lr_scheduler_type": "linear", "train_dataset": choice_rows(40), "method": name, "learning_rate": 1e-3}
    if name in ("galore", "golore"):
        common["interval"] = 3
    saving = {**common, "save_strategy": "steps", "save_steps": 3}
    straight = trainer(tmp_path / "straight", **common)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "resumed", callbacks=[StopAt(5)], **saving).train()
    resumed = trainer(tmp_path / "resumed", tiny_llama(seed=4), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model))
    assert losses(straight) == losses(resumed)
    assert straight.state.log_history[0]["grad_norm"] > 0 and "loss_diff" not in straight.state.log_history[0]
    assert not (tmp_path / "straight/journal.zo").exists()


@every_baseline
def test_micro_batches_make_the_step_of_the_whole_batch(name: str) -> None:
    (x, y), results = problem(), []
    for parts in ((x, y), [(x[:40], y[:40]), (x[40:], y[40:])]):
        optimizer = build(net().double(), baseline(name), lr=1e-2, max_steps=4)
        loss = loss_of(optimizer.model)
        for _ in range(2):
            optimizer.step(loss, parts)
        results.append(torch.cat([p.detach().flatten() for p in optimizer.model.parameters()]))
    if name.startswith("mkor"):  # the mean input is a mean of means, equal for parts of a size only
        assert not torch.equal(*results)
    else:
        assert torch.allclose(*results, rtol=1e-6, atol=1e-9)


# -- what they are ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("fo-sgd", {"momentum": 0.9}, lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9)),
        ("fo-adamw", {"adam_beta2": 0.95}, lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))),
    ],
)
def test_sgd_and_adamw_are_torchs(name: str, options: dict[str, Any], reference: Callable[[Any], torch.optim.Optimizer]) -> None:
    data, one, two = problem(), net(), net()
    optimizer = FirstOrder(one, baselines.get(name, **options), lr=1e-2, weight_decay=0.1)
    matrices = [p for p in two.parameters() if p.dim() > 1]
    vectors = [p for p in two.parameters() if p.dim() == 1]
    torchs = reference([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    for _ in range(10):
        optimizer.step(loss_of(one), data)
        torchs.zero_grad()
        (loss_of(two)(data).sum() / 64).backward()
        torchs.step()
    # The same operations, but for dividing the summed gradient by 64, which is exact.
    assert same_weights(weights(one), weights(two))


def test_gradients_are_clipped_as_torch_clips_them() -> None:
    data, one, two = problem(), net(), net()
    optimizer = FirstOrder(one, "fo-sgd", lr=1e-2, max_grad_norm=0.5)
    optimizer.step(loss_of(one), data)
    loss_of(two)(data).mean().backward()
    norm = nn.utils.clip_grad_norm_(two.parameters(), 0.5)
    torch.optim.SGD(two.parameters(), lr=1e-2).step()
    assert optimizer.last_report is not None and optimizer.last_report.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_mkor_changes_an_inverse_as_inverting_would() -> None:
    generator = torch.Generator().manual_seed(0)
    root, vector = torch.randn(6, 6, generator=generator).double(), torch.randn(6, generator=generator).double()
    matrix = root @ root.T + torch.eye(6)
    exact = torch.linalg.inv(0.9 * matrix + 0.1 * torch.outer(vector, vector))
    assert torch.allclose(updated_inverse(torch.linalg.inv(matrix), vector, 0.9), exact, rtol=1e-10)


def test_mkors_first_step_is_its_equation() -> None:
    (x, y), gamma = problem(8), 0.95
    model = nn.Linear(12, 6, bias=False)
    start = model.weight.detach().clone()
    optimizer = FirstOrder(model, baselines.mkor(momentum=0.0, threshold=1e9), lr=1.0)
    optimizer.step(lambda batch: (model(batch[0]) - batch[1]).square().sum(dim=1), (x, y))
    outputs = 2 * (x @ start.T - y) / 8  # of the mean loss
    g, a, gradient = outputs.sum(dim=0), x.mean(dim=0), outputs.T @ x
    left = torch.linalg.inv(gamma * torch.eye(6) + (1 - gamma) * torch.outer(g, g))
    right = torch.linalg.inv(gamma * torch.eye(12) + (1 - gamma) * torch.outer(a, a))
    change = left @ gradient @ right
    change *= gradient.norm() / change.norm()
    assert torch.allclose(start - model.weight.detach(), change, rtol=1e-3, atol=1e-5)


def test_mkor_h_turns_to_first_order_when_the_loss_stalls() -> None:
    optimizer = FirstOrder(net(), baseline("mkor-h"), lr=0.0)
    run(optimizer, 5)
    assert not optimizer.inner.first_order
    run(optimizer, 5)
    assert optimizer.inner.first_order
    assert not any("left" in state for state in optimizer.inner.state.values()) or run(optimizer, 1)
    assert "left" not in str(list(optimizer.state_dict()["state"]))


def weights_of(name: str, steps: int, **options: Any) -> list[Tensor]:
    model = net()
    run(FirstOrder(model, baselines.get(name, **options), lr=1e-2, max_steps=8, seed=3), steps)
    return [p.detach() for p in model.parameters()]


def test_golore_is_galore_until_it_projects_at_random() -> None:
    small = {"rank": 2, "interval": 1}
    for steps, same in ((4, True), (5, False)):
        both = zip(weights_of("galore", steps, **small), weights_of("golore", steps, random_share=0.5, **small), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in both) == same


def test_mkor_h_is_mkor_until_the_loss_falls_by_less_than_asked() -> None:
    small = {"interval": 1}
    # The end of the second window is the first at which two windows can be compared; it takes effect in step 6.
    for least, steps, same in ((0.99, 5, True), (0.99, 6, False), (0.0, 6, True)):
        both = zip(weights_of("mkor", steps, **small), weights_of("mkor-h", steps, window=3, least_gain=least, **small), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in both) == same


@pytest.mark.parametrize(("rows", "columns"), [(16, 12), (12, 16)])
def test_galore_steps_along_its_projection(rows: int, columns: int) -> None:
    """With β = 0 the step is −η α g P Pᵀ-normalized: R / (|R| + ε) carried back by P."""
    model = nn.Linear(columns, rows, bias=False).double()
    start = model.weight.detach().clone()
    method = baselines.galore(rank=3, scale=0.5, adam_beta1=0.0, adam_beta2=0.0)
    optimizer = FirstOrder(model, method, lr=0.1)
    x = torch.randn(20, columns, generator=torch.Generator().manual_seed(0)).double()
    optimizer.step(lambda batch: model(batch).square().sum(dim=1), x)
    gradient = 2 * (x @ start.T).T @ x / 20
    u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    if rows >= columns:
        expected = (gradient @ vh[:3].T.double()).sign() @ vh[:3].double()
    else:
        expected = u[:, :3].double() @ (u[:, :3].T.double() @ gradient).sign()
    assert torch.allclose(start - model.weight.detach(), 0.1 * 0.5 * expected, atol=1e-4)


def test_golore_projects_at_random_in_its_last_part() -> None:
    model = nn.Linear(12, 16, bias=False)
    optimizer = FirstOrder(model, baselines.golore(rank=3, interval=1), lr=1e-3, max_steps=6, seed=9)
    projector = optimizer.inner.state[model.weight]["projector"]
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    for step in range(1, 7):
        with torch.no_grad():
            gradient = 2 * (x @ model.weight.T).T @ x / 20
        optimizer.step(lambda batch: model(batch).square().sum(dim=1), x)
        leading = torch.linalg.svd(gradient, full_matrices=False)[2][:3]
        frame = projector.ortho_matrix
        assert torch.allclose(frame @ frame.T, torch.eye(3), atol=1e-5)
        # Of rows that span one space the product with its transpose has no singular value but 1.
        same_space = torch.linalg.svdvals(frame @ leading.T).min() > 0.99
        assert same_space == (step <= 3)
    with pytest.raises(ValueError, match="how long the run is"):
        FirstOrder(nn.Linear(12, 16), "golore")


def test_random_frames_are_orthonormal_and_uniform() -> None:
    frames = torch.stack([random_frame(6, 2, Key(0, step, 0, "w", "subspace"), torch.device("cpu")) for step in range(2000)])
    assert torch.allclose(frames.mT @ frames, torch.eye(2).expand(2000, 2, 2), atol=1e-5)
    # Uniform frames have E[P] = 0 and E[P Pᵀ] = (2/6) I; 2000 draws, five standard errors of numbers of variance 1/6 at most.
    assert frames.mean(dim=0).abs().max() < 5 / (6 * 2000) ** 0.5
    assert ((frames @ frames.mT).mean(dim=0) - torch.eye(6) / 3).abs().max() < 5 / (6 * 2000) ** 0.5


def test_scale_normalises_outputs_and_an_embeddings_features() -> None:
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(column_normalized(gradient).square().mean(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(column_normalized(gradient, 0).square().mean(dim=0), torch.ones(7), atol=1e-5)
    model = tiny_llama()
    optimizer = FirstOrder(model, "scale")
    by_name = {name: id(p) for name, p in optimizer.masters.items()}
    assert optimizer.inner.tables == {by_name["model.embed_tokens.weight"]}
    assert optimizer.inner.ends == {by_name["lm_head.weight"]}


def test_adahessian_finds_a_diagonal_hessian() -> None:
    """On Σ aᵢ wᵢ² / 2 the estimate z ∘ H z is a, whatever z is: the first step is η g / a = η w."""
    a = torch.tensor([1.0, 10.0, 100.0])
    model = nn.Linear(3, 1, bias=False)
    start = model.weight.detach().clone()
    FirstOrder(model, "adahessian", lr=0.5).step(lambda batch: (a * model.weight.square() / 2).sum().expand(4), torch.ones(4, 1))
    assert torch.allclose(model.weight.detach(), 0.5 * start, atol=1e-6)


# -- a step's manners -------------------------------------------------------------------------------------------------------------------


def test_dropout_acts_in_a_step_and_the_flags_are_left_as_found() -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.Dropout(0.5), nn.Linear(64, 6))
    model.eval()
    model[1].train()
    optimizer = FirstOrder(model, "fo-sgd", lr=0.0)
    assert len(set(run(optimizer, 4))) == 4
    assert [module.training for module in model.modules()] == [False, False, True, False]


def test_steps_without_a_finite_loss_change_nothing_then_stop() -> None:
    model = net()
    before = weights(model)
    optimizer = FirstOrder(model, "fo-adamw", max_nonfinite_steps=2)
    optimizer.step(lambda batch: loss_of(model)(batch) * torch.nan, problem())
    assert optimizer.last_report is not None and optimizer.last_report.skipped == (True,)
    with pytest.raises(zotune.NonFiniteLossError, match="2 steps in a row"):
        optimizer.step(lambda batch: loss_of(model)(batch) * torch.inf, problem())
    assert same_weights(weights(model), before)


def test_no_update_of_a_half_precision_weight_is_lost() -> None:
    """2000 steps of 1e-6 against weights of 1 in bfloat16, whose spacing is 8e-3."""
    model = nn.Linear(4, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = FirstOrder(model, "fo-sgd", lr=1e-5)
    for _ in range(2000):
        optimizer.step(lambda batch: model(batch).float().mean(), torch.ones(2, 4).bfloat16())
    assert torch.allclose(model.weight.detach().float(), torch.full((1, 4), 0.98), atol=4e-3)


@pytest.mark.parametrize("name", ["fo-adamw", "adahessian", "mkor"])
def test_activation_checkpointing_changes_no_result(name: str, tmp_path: Path) -> None:
    runs = []
    for number, checkpointing in enumerate((False, True)):
        here = trainer(tmp_path / str(number), method=name, activation_checkpointing=checkpointing, max_steps=3, learning_rate=1e-3)
        here.train()
        runs.append(here)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(run.model.parameters() for run in runs), strict=True))
    per_step = baselines.get(name).forwards_per_step
    assert [run.zo_optimizer.forward_passes for run in runs] == [3 * per_step, 3 * (per_step + 1)]


# -- settings and names -----------------------------------------------------------------------------------------------------------------


def test_the_config_gives_a_baseline_its_options(tmp_path: Path) -> None:
    made = config(tmp_path, method="fo-adamw", adam_beta2=0.95, learning_rate=None, max_grad_norm=1.0)
    assert made.chosen_method() == baselines.fo_adamw(adam_beta2=0.95) and made.learning_rate == 5e-5
    assert config(tmp_path, method="galore", rank=8, interval=50).chosen_method() == baselines.galore(rank=8, interval=50)
    assert config(tmp_path, method="fo-sgd", momentum=0.5).chosen_method() == baselines.fo_sgd(momentum=0.5)
    assert config(tmp_path, method="mkor", method_args='{"gamma": 0.9}').chosen_method() == baselines.mkor(gamma=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fo-adam"}, "unknown method 'fo-adam'; did you mean 'fo-adamw'"),
        ({"method": "fo-sgd", "learning_rate": "auto"}, "cannot be calibrated: give a number"),
        ({"method": "fo-sgd", "rank": 3}, "method 'fo-sgd' has no option 'rank'"),
        ({"method": "fo-sgd", "eps": 1e-3}, "method 'fo-sgd' has no option 'eps'"),
        ({"method": "fo-sgd", "adam_beta1": 0.8}, "fo-sgd has no such option"),
        ({"method": "fo-sgd", "forward_batching": "batched"}, "evaluates no perturbed weights"),
        ({"method": "fo-sgd", "bf16": True}, "load the model in that dtype"),
        ({"method": "mezo", "max_grad_norm": 1.0}, "no gradient is computed"),
        ({"method": "fo-sgd", "max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
        ({"method": "hybrid", "activation_checkpointing": True}, "stores the activations of its last blocks only"),
        ({"method": "hybrid", "forward_batching": "batched"}, "hybrid evaluates one point after the other"),
        ({"method": "hybrid", "update_rule": "Adam"}, "update_rule must be 'AdamW' or 'SGD'"),
        ({"method": "hybrid", "method_args": {"blocks": 0}}, "blocks must be a whole number of at least 1"),
        ({"method": "zero-shot", "max_grad_norm": 1.0}, "no gradient is computed"),
        ({"method": "golore", "method_args": {"random_share": 2}}, "random_share must be in"),
    ],
)
def test_wrong_settings_name_the_fix(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_every_name_is_known_once_and_says_where_it_is_from() -> None:
    assert len(set(catalog.names())) == len(catalog.names())
    for name in baselines.names():
        method = catalog.get(name)
        assert method.options == catalog.options_of(name) and catalog.get(name, **method.options) == catalog.get(name)
        doc = baselines.recipe(name).__doc__
        assert doc is not None and "State:" in doc and method.arxiv in doc
