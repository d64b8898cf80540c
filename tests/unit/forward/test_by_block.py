"""Modules without a batched form are called once for each block of rows, and the rest of the model stays batched."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from zotune import ZerothOrder, methods
from zotune.forward.batches import assign_directions, assigned_layout
from zotune.forward.model import PerturbedForward
from zotune.rng.directions import Directions
from zotune.subspaces import Full, LowRank
from zotune.subspaces.coordinate import Offset

ROWS, EPS = 4, 0.3


class Mixer(nn.Module):
    """A weight in a function without a batched form, and a layer with a hook inside."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.inner = nn.Parameter(torch.randn(20, 24) / 5), nn.Linear(24, 20)

    def forward(self, x: Tensor, state: object = None) -> tuple[Tensor, object]:
        return x + self.inner(torch.einsum("btn,nm->btm", x, torch.exp(self.decay))), state


class Net(nn.Module):
    def __init__(self, mixer: nn.Module, state: object = None) -> None:
        super().__init__()
        self.first, self.mixer, self.last, self.state = nn.Linear(6, 20), mixer, nn.Linear(20, 3), state

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(self.first(x), self.state)
        return self.last(x[0] if isinstance(x, tuple) else x)


class Attention(nn.Module):
    """A layer that reads its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)

    def forward(self, x: Tensor, state: object) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(20, 20)

    def forward(self, x: Tensor, state: object) -> Tensor:
        return self.recurrent(x.transpose(0, 1))[0].transpose(0, 1)


MIXERS = {"mixer": Mixer, "mixer.attention": Attention, "mixer.recurrent": TimeFirst}
SUBSPACES = {"full": Full(), "low rank": LowRank(2, 5)}


def net(name: str, state: object = None) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(MIXERS[name](), state).eval()


def forward_of(model: nn.Module, kind: str = "low rank") -> PerturbedForward:
    forward = PerturbedForward(model, [SUBSPACES[kind].coordinate(n, p) for n, p in model.named_parameters()], Directions("gaussian"))
    for coordinate in forward.coordinates:
        coordinate.begin_step(0, 0)
        coordinate.descend(forward.directions, [0.1], 1.0, 0, 0)
    return forward


def evaluated(forward: PerturbedForward, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The outputs of a direction per row, in one forward and one by one."""
    layout = assigned_layout((0, 1), EPS, assign_directions([len(x)], len(x), 2)[0], 0, 1)
    found = forward.evaluate_batched(lambda: model(x[layout.source]), layout)
    expected = []
    for block in range(layout.blocks):
        scale = layout.scales[block // len(layout.scales[0])][block % len(layout.scales[0])]
        offset = Offset(scale, 0, 1, layout.directions[block // len(layout.scales[0])]) if scale else None
        source = layout.source[block : block + 1]
        expected.append(forward.evaluate(lambda rows=source: model(x[rows]), offset))
    return found, expected


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("kind", SUBSPACES)
def test_outputs_are_those_of_one_point_after_the_other(name, kind):
    model, x = net(name), torch.randn(ROWS, 5, 6, generator=torch.Generator().manual_seed(1))
    forward = forward_of(model, kind)
    with pytest.warns(UserWarning, match=f"{name.split('.')[0]}.* cannot be evaluated with several weights at once"):
        found, expected = evaluated(forward, model, x)
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert not torch.allclose(found[:ROWS], found[ROWS : 2 * ROWS], atol=1e-2)
    assert forward.by_block.names == (["mixer"] if name == "mixer.recurrent" else [name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        again, _ = evaluated(forward, model, x)
    assert torch.equal(found, again)


def test_the_module_is_itself_again_whatever_it_raises():
    model, x = net("mixer"), torch.randn(ROWS, 5, 6)
    forward = forward_of(model)
    before = model.mixer.__dict__.copy()
    forward.by_block.include(["mixer"])
    evaluated(forward, model, x)
    assert model.mixer.__dict__ == before

    def broken(x: Tensor, state: object) -> Tensor:
        assert model.mixer.forward is not broken
        raise ZeroDivisionError

    model.mixer.forward = broken
    with pytest.raises(ZeroDivisionError):
        evaluated(forward, model, x)
    assert model.mixer.forward is broken
    assert all(c.hook_core is c.core for c in forward.coordinates if isinstance(c, type(forward.low_rank_hooks[0].coordinate)))


def test_an_input_that_cannot_be_cut_is_named():
    class DynamicCache:
        pass

    model, x = net("mixer", DynamicCache()), torch.randn(ROWS, 5, 6)
    optimizer = ZerothOrder(model, methods.lozo_e(), lr=0.0)
    with pytest.warns(UserWarning, match="of type DynamicCache does not consist of the batch's rows .call the model with use_cache"):
        optimizer.step(lambda rows: model(rows).square().mean(dim=(1, 2)), x)
    assert optimizer.evaluator.rowwise is False


def test_a_resumed_run_calls_the_same_modules_by_block():
    def run(state: dict | None) -> tuple[Tensor, dict]:
        model, x = net("mixer.recurrent"), torch.randn(ROWS, 5, 6, generator=torch.Generator().manual_seed(1))
        optimizer = ZerothOrder(model, methods.lozo_e(), lr=0.0)
        if state is not None:
            optimizer.load_state_dict(state)
            assert optimizer.forward.by_block.names == ["mixer"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(1 if state else 2):
                optimizer.step(lambda rows: model(rows).square().mean(dim=(1, 2)), x)
                state = state or optimizer.state_dict()
        return optimizer.last_report.coefficients, state

    straight, state = run(None)
    assert torch.equal(run(state)[0], straight)
