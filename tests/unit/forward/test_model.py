"""Laws 1 and 6: evaluating never writes a weight, and the fast and the general path are one function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder
from zotune.forward.model import PerturbedForward
from zotune.rng.directions import Directions
from zotune.subspaces import Full, LowRank, LowRankCoordinate, Offset

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUBSPACES = {"full": Full(), "low rank": LowRank(rank=2, interval=5)}


def probe_of(model: nn.Module, subspace: Full | LowRank) -> PerturbedForward:
    coordinates = [subspace.coordinate(name, parameter) for name, parameter in model.named_parameters()]
    for coordinate in coordinates:
        coordinate.begin_step(0, 0)
    return PerturbedForward(model, coordinates, Directions("gaussian"))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


class Broken(nn.Module):
    """Raises in the middle of a forward, after some layers have run."""

    def __init__(self, inner: nn.Module, error: type[BaseException]) -> None:
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        raise self.error("in the forward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", toys.names())
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, ZeroDivisionError])
def test_a_forward_that_raises_leaves_every_bit_as_it_was(method, dtype, error):
    inner = toys.classifier(dtype)
    model = Broken(inner, error)
    model.train()
    inner[1].eval()
    optimizer = ZerothOrder(model, method, lr=1e-2)
    before, flags = bits(model), [module.training for module in model.modules()]
    tables = [module._parameters for module in model.modules()]
    rng = torch.get_rng_state()
    with pytest.raises(error):
        optimizer.step(lambda b: model(b[0]).mean(dim=(1, 2)), toys.batch())
    assert unchanged(model, before)
    assert [module.training for module in model.modules()] == flags
    assert all(module._parameters is table for module, table in zip(model.modules(), tables, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    optimizer.remove_hooks()
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SUBSPACES)
def test_evaluating_writes_nothing(kind, dtype):
    model = toys.classifier(dtype)
    forward, before = probe_of(model, SUBSPACES[kind]), bits(model)
    x = toys.batch()[0]
    here = model(x)
    there = forward.evaluate(lambda: model(x), Offset(1e-1, 0, 0, 0))
    assert not torch.equal(here, there)
    assert unchanged(model, before) and torch.equal(model(x), here)


def perturbed_by_hand(model: nn.Module, forward: PerturbedForward, offset: Offset) -> nn.Module:
    hand = copy.deepcopy(model)
    with torch.no_grad():
        for coordinate, parameter in zip(forward.coordinates, hand.parameters(), strict=True):
            z = forward.directions.draw(offset.key(coordinate.name), coordinate.shape)
            move = z @ coordinate.v.mT if isinstance(coordinate, LowRankCoordinate) else z
            parameter.copy_(parameter.float() + offset.scale * move.view(parameter.shape))
    return hand


@pytest.mark.parametrize("name", toys.ARCHITECTURES)
@pytest.mark.parametrize("kind", SUBSPACES)
@pytest.mark.parametrize("scale", [1e-2, -1e-2])
def test_plus_and_minus_losses_are_of_weights_perturbed_by_hand(name, kind, scale):
    model = toys.transformer(name).eval()
    clean = copy.deepcopy(model)
    forward, offset, ids = probe_of(model, SUBSPACES[kind]), Offset(scale, 0, 0, 0), toys.tokens()
    hand = perturbed_by_hand(clean, forward, offset)
    expected, base = toys.transformer_loss(hand)(ids), toys.transformer_loss(clean)(ids)
    losses = forward.evaluate(lambda: toys.transformer_loss(model)(ids), offset)
    assert (expected - base).abs().max() > 1e-3
    assert torch.allclose(losses, expected, atol=2e-5)


@pytest.mark.parametrize("name", toys.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_side_paths_and_general_path_agree(name, dtype):
    model = toys.transformer(name, dtype).eval()
    forward, offset, ids = probe_of(model, LowRank(rank=2, interval=5)), Offset(1e-2, 0, 0, 0), toys.tokens()
    assert forward.low_rank_hooks, "no layer of this architecture has a low-rank hook"

    def run(low_rank_hooks: bool) -> torch.Tensor:
        with torch.no_grad(), forward.at(offset, hooks=low_rank_hooks):
            return toys.transformer_loss(model)(ids)

    assert torch.allclose(run(True), run(False), atol=2e-5 if dtype == torch.float32 else 8e-2)


@pytest.mark.parametrize("name", toys.ARCHITECTURES)
def test_most_of_a_transformer_takes_side_paths_that_agree(name):
    model = toys.transformer(name)
    forward = probe_of(model, LowRank(rank=2, interval=5))
    ids = toys.tokens()
    assert forward.prepare(lambda: toys.transformer_loss(model)(ids), Offset(1e-2, 0, 0, 0)) == []
    matrices = [c for c in forward.coordinates if isinstance(c, LowRankCoordinate)]
    assert sum(c.uses_hook for c in matrices) >= len(matrices) - 1  # OPT's position table shifts its ids: the general path


def test_a_low_rank_hook_makes_nothing_of_the_size_of_the_weight():
    from torch.utils._python_dispatch import TorchDispatchMode

    model = nn.Sequential(nn.Embedding(300, 200), nn.Linear(200, 300, bias=False))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    forward = probe_of(model, LowRank(rank=2, interval=5))

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in weights:
                Largest.numel = max(Largest.numel, out.numel())
            return out

    with Largest():
        forward.evaluate(lambda: model(torch.tensor([[1, 2]])), Offset(1e-2, 0, 0, 0))
    assert 0 < Largest.numel < 200 * 300 / 10


def test_tied_weights_share_one_coordinate_and_move_together():
    model = toys.transformer("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    forward = probe_of(model, LowRank(rank=2, interval=5))
    tied = [path for path in forward.low_rank_hooks if path.coordinate.name == "model.embed_tokens.weight"]
    assert len(tied) == 2


def test_a_weight_a_parent_reads_directly_is_noticed_and_right():
    class Attention(nn.Module):  # MultiheadAttention reads out_proj.weight without calling out_proj
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Embedding(20, 16), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x)
            return self.attention(h, h, h, need_weights=False)[0].square().mean(dim=(1, 2))

    torch.manual_seed(0)
    model = Attention().eval()
    clean = copy.deepcopy(model)
    forward, offset, x = probe_of(model, LowRank(rank=2, interval=5)), Offset(1e-1, 0, 0, 0), toys.batch()[0]
    with pytest.warns(UserWarning, match=r"out_proj\.weight: read from outside"):
        assert forward.prepare(lambda: model(x), offset) == ["attention.out_proj.weight"]
    expected = perturbed_by_hand(clean, forward, offset)(x)
    assert torch.allclose(forward.evaluate(lambda: model(x), offset), expected, atol=1e-6)


def test_a_weight_whose_dtype_is_read_keeps_its_side_path():
    class Casting(nn.Module):  # PEFT's LoRA does this
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.to(self.inner.weight.dtype)).square().sum(dim=-1)

    model, x = Casting(), torch.randn(4, 8)
    forward = probe_of(model, LowRank(rank=2, interval=5))
    assert forward.prepare(lambda: model(x), Offset(1e-3, 0, 0, 0)) == [] and len(forward.low_rank_hooks) == 1


def test_a_wrong_side_path_falls_back_with_a_warning():
    class Doubling(nn.Module):
        """Sends its input through the layer twice as large as the layer's hook can see."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.inner.register_forward_hook(lambda module, args, output: output * output)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).sum(dim=-1)

    torch.manual_seed(0)
    model, x = Doubling(), torch.randn(4, 8)
    clean = copy.deepcopy(model)
    forward, offset = probe_of(model, LowRank(rank=2, interval=5)), Offset(1e-1, 0, 0, 0)
    with pytest.warns(UserWarning, match="disagree"):
        forward.prepare(lambda: model(x), offset)
    assert not forward.low_rank_hooks
    expected = perturbed_by_hand(clean, forward, offset)(x)
    assert torch.allclose(forward.evaluate(lambda: model(x), offset), expected, atol=1e-5)


@pytest.mark.parametrize("kind", SUBSPACES)
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(6, 5, batch_first=True),
        lambda: nn.Conv1d(4, 3, 3),
        lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True),
        lambda: nn.Bilinear(6, 6, 3),
    ],
    ids=["lstm", "conv", "encoder layer", "bilinear"],
)
def test_any_module_works(kind, build):
    torch.manual_seed(0)
    model = build().eval()
    clean = copy.deepcopy(model)
    x = torch.randn(2, 4, 6)
    args = (x, x) if isinstance(model, nn.Bilinear) else (x,)

    def output(module: nn.Module) -> torch.Tensor:
        out = module(*args)
        return out[0] if isinstance(out, tuple) else out

    forward, offset = probe_of(model, SUBSPACES[kind]), Offset(1e-1, 0, 0, 0)
    with torch.no_grad():
        if kind == "low rank" and isinstance(model, nn.TransformerEncoderLayer):
            with pytest.warns(UserWarning, match="read from outside"):
                forward.prepare(lambda: output(model), offset)
        expected = output(perturbed_by_hand(clean, forward, offset))
    assert torch.allclose(forward.evaluate(lambda: output(model), offset), expected, atol=1e-5)
    assert not torch.allclose(output(clean), expected, atol=1e-3)


def test_a_steps_points_are_evaluated_under_the_same_randomness():
    model, seen = toys.classifier(), []
    optimizer = ZerothOrder(model, "mezo", lr=0.0, forward_batching="sequential")

    def noisy(batch):
        seen.append(float(torch.rand(())))
        return model(batch[0]).mean(dim=(1, 2))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    optimizer.step(noisy, toys.batch())
    optimizer.step(noisy, toys.batch())
    assert torch.equal(torch.get_rng_state(), before)
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[0] != seen[2]


def test_the_model_is_in_eval_mode_during_a_step_and_put_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model.train()
    model[0].eval()
    seen = []

    def loss(x):
        seen.append([m.training for m in model.modules()])
        return model(x).mean(dim=1)

    ZerothOrder(model, "lozo", lr=1e-3).step(loss, torch.ones(2, 4))
    assert not any(flag for flags in seen for flag in flags)
    assert [m.training for m in model.modules()] == [True, False, True, True]
