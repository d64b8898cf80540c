"""Groups of texts in llama.cpp, and what an exception within an evaluation leaves behind."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_models import Pair, choice_batch, texts
from zotune.engines.engine import Row
from zotune.engines.llama_cpp import library
from zotune.engines.llama_cpp.context import MAX_SEQUENCES, grouped
from zotune.engines.llama_cpp.llama import LlamaOptions
from zotune.engines.model import EngineModel
from zotune.io.cores import available_cores

Opened = Callable[..., EngineModel]
LENGTHS = [9, 75, 1, 30, 20, 4, 64, 12]


def logits(model: EngineModel, lengths: list[int] = LENGTHS, seed: int = 0) -> Tensor:
    batch = choice_batch(lengths, seed=seed)
    return model.scored_logits(batch, batch["positions"])


def test_many_small_groups_give_what_one_group_gives(model: EngineModel, llama: Pair, opened: Opened) -> None:
    one, many = logits(model), logits(opened(llama, n_ubatch=32))
    assert float((one - many).abs().max()) <= 1e-5 * float(one.abs().max())


@pytest.mark.parametrize("n_ubatch", [1024, 32])
def test_earlier_evaluations_change_no_bit(llama: Pair, opened: Opened, n_ubatch: int) -> None:
    fresh, used = opened(llama, n_ubatch=n_ubatch), opened(llama, n_ubatch=n_ubatch)
    first = logits(fresh)
    assert torch.equal(logits(fresh), first)
    for lengths in ([1], [300, 2], [5] * 40, [320] * 4):  # the context grows three times
        logits(used, lengths, seed=7)
    assert torch.equal(logits(used), first)


def test_two_threads_give_the_bits_of_one(llama: Pair, model: EngineModel, opened: Opened) -> None:
    assert torch.equal(logits(opened(llama, n_threads=2), [9, 4]), logits(model, [9, 4]))


def test_more_threads_than_cores_are_not_used(llama: Pair, opened: Opened) -> None:
    with pytest.warns(UserWarning, match=r"^n_threads=500 is more than the \d+ cores? that this process may use, .* used\.$"):
        model = opened(llama, n_threads=500)
    logits(model, [3])
    assert model.engine.lib.llama_n_threads(model.engine._context._context) == available_cores()


def test_half_precision_of_keys_and_values_is_near(llama: Pair, model: EngineModel, opened: Opened) -> None:
    full, half = logits(model), logits(opened(llama, cache_type="f16"))
    assert 0 < float((full - half).abs().max()) < 1e-2 * float(full.abs().max())


def test_groups_are_neighbors_within_both_limits() -> None:
    def row(length: int, continuations: int = 1) -> Row:
        ids = torch.zeros(length, dtype=torch.int32).numpy()
        segments = ids.copy()
        segments[-1] = continuations
        return Row(ids, ids, segments, ids[:0])

    rows = [row(10), row(20), row(50), row(3), row(29), row(1)]
    assert [(len(group.rows), group.first) for group in grouped(rows, 32)] == [(2, 0), (1, 30), (2, 80), (1, 112)]
    assert [len(group.rows) for group in grouped([row(2, 100)] * 5, 1024)] == [MAX_SEQUENCES // 100] * 2 + [1]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("n_ubatch", 31, "n_ubatch must be at least 32"), ("n_ctx", -1, "n_ctx must be at least 0"), ("cache_type", "q8_0", "f32 or f16")],
)
def test_options_out_of_range_are_named(option: str, value: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaOptions(**{option: value})


def test_a_closed_engine_says_so(llama: Pair) -> None:
    model = llama.engine()
    logits(model)
    model.engine.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        logits(model)


def test_a_8_bit_file_gives_the_same_bits_in_any_state(llama_q8: Pair, opened: Opened) -> None:
    one, two = opened(llama_q8), opened(llama_q8, n_threads=2)
    first = logits(one, [9, 4])
    logits(one, [320, 7])
    assert torch.equal(logits(one, [9, 4]), first) and torch.equal(logits(two, [9, 4]), first)


# -- exceptions ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("of a hook"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("kind", ["input", "output"])
def test_what_a_hook_raises_passes_through(model: EngineModel, error: BaseException, kind: str) -> None:
    before = logits(model)

    def fail(*_: object) -> None:
        raise error

    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = layer.register_forward_pre_hook(fail) if kind == "input" else layer.register_forward_hook(fail)
    with pytest.raises(type(error)) as raised:
        logits(model)
    assert raised.value is error
    handle.remove()
    assert torch.equal(logits(model), before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt whatever was before, and not within the garbage collector, whose callbacks lose it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_during_an_evaluation_is_raised(model: EngineModel) -> None:
    batch = texts([320] * 3)
    before, most = logits(model), 200
    for delay in (0.002, 0.01, 0.02, 0.04):  # in ctypes callbacks, where exceptions are lost by default, or outside of them
        timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in range(most):
                model(**batch)
        timer.join()
    assert torch.equal(logits(model), before)


class _InterruptedLog(list[str]):
    """A log in which the user's Ctrl-C comes at the first line."""

    def append(self, _line: str) -> None:
        if not self:
            super().append("interrupted")
            raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["freed", "made"])
def test_an_interrupt_while_a_context_is_changed(llama: Pair, opened: Opened, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Nothing freed is used again, and no half-made context is taken."""
    model = opened(llama)
    before = logits(model)
    if moment == "made":
        model.engine._context.free()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(library, "_log", _InterruptedLog())
        if moment == "made":
            logits(model)
        else:
            model.engine._context.free()
    assert torch.equal(logits(model), before)
