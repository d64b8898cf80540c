"""Facts of a run on a CUDA device: the same directions, weights read and written as on a CPU, few waits. Skipped where there is none."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import kernel_cases
import toys
from zotune import ZerothOrder, methods, objectives, replay
from zotune.rng.directions import Directions, Key
from zotune.subspaces import Full
from zotune.subspaces.coordinate import Offset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.bfloat16]
#: name, options, forward_batching
RUNS = [
    ("lozo", {}, "batched"),
    ("lozo", {}, "sequential"),
    ("lozo-e", {}, "batched"),
    ("lozo-m", {"directions_per": "example", "rank": 1}, "batched"),
    ("mezo", {}, "sequential"),
    ("mezo", {"direction": "rademacher"}, "batched"),
    ("mezo-adam", {}, "sequential"),
]


#: Matrices that are not thin, so that full space has something large.
WIDE = {
    "opt": {"hidden_size": 96, "ffn_dim": 160, "word_embed_proj_dim": 96, "vocab_size": 200},
    "llama": {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 200},
    "gpt2": {"n_embd": 96, "vocab_size": 200},
}


def plain(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return toys.transformer(architecture, dtype, **WIDE[architecture]).eval()


def model_of(architecture: str = "opt", dtype: torch.dtype = torch.float32) -> nn.Module:
    return plain(architecture, dtype).cuda()


def trained(model: nn.Module, name: str, options: dict, forward_batching: str, steps: int = 8, journal=None, seed: int = 5) -> ZerothOrder:
    optimizer = ZerothOrder(
        model, toys.method(name, interval=3, **options), lr=1e-4, seed=seed, forward_batching=forward_batching, journal=journal
    )
    loss = toys.transformer_loss(model)
    for step in range(steps):
        optimizer.step(loss, toys.tokens(6, 7).cuda().roll(step, 0))
    return optimizer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("count", [5, 2048, 140_003, (1 << 22) + 77])
def test_directions_are_those_of_a_cpu(kind, count):
    key = Key(3, 4, 1, "w")
    assert torch.equal(Directions(kind).draw(key, (count,), "cuda").cpu(), Directions(kind).draw(key, (count,)))
    many = Directions(kind).draw_many(key, 5, (700,), "cuda").cpu()
    assert torch.equal(many, Directions(kind).draw_many(key, 5, (700,)))


def test_the_kernel_equals_the_reference():
    kernel_cases.check(torch.device("cuda"))
    kernel_cases.check_layers(torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_both_points_at_once_are_the_two_points(dtype, kind):
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    coordinate, directions = Full().coordinate("w", nn.Parameter(weight, requires_grad=False)), Directions(kind)
    coordinate.descend(directions, [1e-4], 1.0, 0, 0)  # something below the weight's last bit
    found = [part.clone() for _, parts in coordinate.strips_at_scales(directions, Key(3, 4, 0, "w"), [1e-2, -1e-2], 70) for part in parts]
    for scale, one in zip((1e-2, -1e-2), found, strict=True):
        assert torch.equal(one, coordinate.at(directions, Offset(scale, 3, 4, 0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, options, forward_batching", RUNS)
@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_the_journal_replays_bit_for_bit(tmp_path, architecture, name, options, forward_batching, dtype):
    model = model_of(architecture, dtype)
    fresh = copy.deepcopy(model)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    optimizer = trained(model, name, options, forward_batching, journal=tmp_path / "journal.zo")
    optimizer.journal.close()
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(torch.cuda.get_rng_state(), states[1])
    replay(fresh, tmp_path / "journal.zo")
    found, expected = weights(fresh), weights(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("name, options, forward_batching", RUNS)
def test_a_step_is_that_of_a_cpu(architecture, name, options, forward_batching):
    on_card, on_cpu = model_of(architecture), plain(architecture)
    first = trained(on_card, name, options, forward_batching, steps=1).last_report
    second = ZerothOrder(on_cpu, toys.method(name, interval=3, **options), lr=1e-4, seed=5, forward_batching=forward_batching)
    second.step(toys.transformer_loss(on_cpu), toys.tokens(6, 7))
    assert torch.allclose(first.coefficients, second.last_report.coefficients, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lozo", "mezo"])
def test_batched_and_sequential_agree(name, dtype):
    """Also where a layer forms its weights because a block has many rows."""
    found = []
    for forward_batching in ("batched", "sequential"):
        wide = {"hidden_size": 256, "ffn_dim": 1024, "word_embed_proj_dim": 256, "max_position_embeddings": 512}
        model = toys.transformer("opt", dtype, **wide).eval().cuda()
        optimizer = ZerothOrder(model, methods.get(name, eps=1e-2), lr=1e-4, seed=5, forward_batching=forward_batching)
        for _ in range(2):
            optimizer.step(toys.transformer_loss(model), toys.tokens(8, 500).cuda())
        found.append(optimizer.last_report)
    gap = max(found[0].loss_diff, found[1].loss_diff)
    assert abs(found[0].loss - found[1].loss) < (2e-2 if dtype == torch.bfloat16 else 1e-4) * found[0].loss
    assert abs(abs(float(found[0].coefficients[0])) - abs(float(found[1].coefficients[0]))) < 0.1 * gap / 1e-2 + 1


@pytest.mark.parametrize("name, options, forward_batching", RUNS)
def test_a_step_waits_for_the_device_no_more_than_once(name, options, forward_batching):
    model = model_of()
    optimizer = trained(model, name, options, forward_batching, steps=4)
    loss, batch = toys.transformer_loss(model), toys.tokens(6, 7).cuda()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(loss, batch)  # step 4: neither a redraw nor a first
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    ours = [place for place in waits if "transformers" not in place]  # the model's own look at its mask
    assert len(ours) <= 1, ours


def language_batch(step: int, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 60, (6, length), generator=torch.Generator().manual_seed(step)).cuda()
    mask = torch.ones_like(ids)
    mask[:2, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "positions": torch.full((6, 1), length - 2).cuda(), "targets": ids[:, -1:]}


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("name, options, forward_batching", RUNS[:6])
def test_a_recorded_evaluation_is_the_evaluation(architecture, name, options, forward_batching):
    """Across redraws, shapes of batches, and weights that are loaded in between."""
    found = {}
    for cuda_graphs in ("auto", False):
        model = model_of(architecture)
        optimizer = ZerothOrder(
            model, toys.method(name, interval=3, **options), lr=1e-4, seed=5, forward_batching=forward_batching, cuda_graphs=cuda_graphs
        )
        loss, seen = objectives.LanguageModelLoss(model), []
        for step in range(8):
            if step == 5:
                model.load_state_dict({key: 0.9 * value for key, value in model.state_dict().items()})
            optimizer.step(loss, language_batch(step, 12 if step % 2 else 9))
            seen.append(optimizer.last_report)
        found[cuda_graphs] = seen
        recorded = 2 if forward_batching == "batched" else 4  # a point each
        if name == "lozo-e":  # measures its layers' scales on fewer examples, twice
            recorded = 4
        if not cuda_graphs or (architecture == "gpt2" and name == "mezo"):  # whose Conv1D in full space has no kernel
            recorded = 0
        assert optimizer.evaluator.graphs.captured == recorded
    for one, other in zip(*found.values(), strict=True):
        assert abs(one.loss - other.loss) < 1e-4 * other.loss
        assert torch.allclose(one.coefficients, other.coefficients, rtol=1e-2, atol=1e-2 + 1e-2 * float(other.coefficients.abs().max()))


def test_what_cannot_be_recorded_is_evaluated_as_ever():
    model = model_of()
    loss_of = toys.transformer_loss(model)

    def waits(batch):
        return loss_of(batch) + 0 * float(loss_of(batch).sum())

    def draws(batch):
        return loss_of(batch) + 0 * torch.rand(len(batch), device="cuda")

    for loss in (waits, draws):
        optimizer = ZerothOrder(model, "lozo", lr=1e-4, forward_batching="batched", cuda_graphs=True)
        for _ in range(2):
            optimizer.step(loss, toys.tokens(6, 7).cuda())
        assert not optimizer.evaluator.graphs.enabled
        optimizer.remove_hooks()


@pytest.mark.parametrize("name", ["lozo", "mezo"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_runs_are_equal_bit_for_bit(tmp_path, name, dtype):
    model = model_of(dtype=dtype)
    fresh, twin = copy.deepcopy(model), copy.deepcopy(model)
    for one, path in ((model, tmp_path / "journal.zo"), (twin, None)):
        optimizer = ZerothOrder(one, toys.method(name, interval=3), lr=1e-4, seed=5, forward_batching="batched", journal=path)
        loss = objectives.LanguageModelLoss(one)
        for step in range(8):
            optimizer.step(loss, language_batch(step))
        if path:
            optimizer.journal.close()
    replay(fresh, tmp_path / "journal.zo")
    expected = weights(model)
    for other in (fresh, twin):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(other).items())
