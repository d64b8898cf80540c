"""Low-rank factors in llama.cpp: what is added is left · rightᵀ, whatever was added before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_models import Pair, choice_batch
from zotune.engines.engine import Row
from zotune.engines.llama_cpp.library import Tensors
from zotune.engines.model import EngineModel

Opened = Callable[..., EngineModel]
Factors = dict[str, tuple[Tensor, Tensor]]
LENGTHS = [5, 1, 12, 7]


def random_factors(model: EngineModel, rank: int | Callable[[int], int], seed: int = 0, size: float = 0.1) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for place, (name, (m, n)) in enumerate(model.engine.matrices.items()):
        r = rank if isinstance(rank, int) else rank(place)
        if r:
            found[name] = (size * torch.randn(m, r, generator=generator), size * torch.randn(n, r, generator=generator))
    return found


def logits(model: EngineModel, folded: Factors | None = None, current: Factors | None = None) -> Tensor:
    """Logits with these factors, at their layers."""
    folded, current = folded or {}, current or {}
    for name, layer in model.matrices.items():
        m, n = model.engine.matrices[name]
        layer.left, layer.right = folded.get(name, (torch.zeros(m, 0), torch.zeros(n, 0)))
        layer.product = None if name not in current else lambda name=name: current[name]
    batch = choice_batch(LENGTHS)
    return model.scored_logits(batch, batch["positions"])


def expected(pair: Pair, *factors: Factors) -> Tensor:
    copy, batch = pair.fresh(), choice_batch(LENGTHS)
    with torch.no_grad():
        for one in factors:
            for name, (left, right) in one.items():
                copy.get_submodule(name).weight += left @ right.T
        found = copy(batch["input_ids"], batch["attention_mask"]).logits
    return found[torch.arange(len(found)).unsqueeze(1), batch["positions"]]


def close(found: Tensor, reference: Tensor, size: float = 1e-4) -> None:
    assert float((found - reference).abs().max()) <= size * float(reference.abs().max())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_factors_add_their_product_to_each_matrix(request: pytest.FixtureRequest, opened: Opened, kind: str) -> None:
    pair = request.getfixturevalue(kind)
    model = opened(pair)
    one = random_factors(model, 2)
    close(logits(model, current=one), expected(pair, one))
    assert float((logits(model, current=one) - logits(model)).abs().max()) > 0.05


def test_folded_and_current_factors_add_up(llama: Pair, model: EngineModel) -> None:
    folded, current = random_factors(model, 3), random_factors(model, 1, seed=1)
    both = {name: tuple(torch.cat(sides, dim=1) for sides in zip(folded[name], current[name], strict=True)) for name in folded}
    found = logits(model, folded, current)
    close(found, expected(llama, folded, current))
    assert torch.equal(logits(model, current=both), found)
    assert torch.equal(logits(model, folded=both), found)


def test_matrices_may_have_different_ranks_and_none(llama: Pair, model: EngineModel) -> None:
    folded, current = random_factors(model, lambda place: place % 3), random_factors(model, lambda place: (place + 1) % 2, seed=1)
    close(logits(model, folded, current), expected(llama, folded, current))


def test_factors_of_zeros_change_no_bit(model: EngineModel) -> None:
    bare = logits(model)
    zeros = random_factors(model, 2, size=0.0)
    assert torch.equal(logits(model, current=zeros), bare)
    assert torch.equal(logits(model, current={name: (left, right + 1) for name, (left, right) in zeros.items()}), bare)


def test_earlier_factors_leave_no_trace(llama: Pair, model: EngineModel, opened: Opened) -> None:
    other, one = opened(llama), random_factors(model, 2)
    bare, with_one = logits(other), logits(other, current=one)
    logits(model, random_factors(model, 4, seed=3), random_factors(model, 2, seed=4))
    logits(model, current=random_factors(model, 2, seed=5))
    assert torch.equal(logits(model, current=one), with_one)
    logits(model, current=random_factors(model, lambda place: place % 2, seed=5))
    assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model, current=one), with_one)


def test_factors_that_are_not_finite_leave_no_trace(model: EngineModel) -> None:
    one = random_factors(model, 2)
    bare, before = logits(model), logits(model, current=one)
    assert logits(model, current={name: (left * torch.nan, right) for name, (left, right) in one.items()}).isnan().all()
    assert torch.equal(logits(model, current=one), before)
    assert torch.equal(logits(model), bare)


def test_factors_changed_in_place_are_the_ones_added(llama: Pair, model: EngineModel) -> None:
    one = random_factors(model, 2)
    logits(model, current=one)
    for left, _ in one.values():
        left.neg_()
    close(logits(model, current=one), expected(llama, one))


def test_factors_survive_a_context_that_grows(llama: Pair, opened: Opened) -> None:
    model = opened(llama)
    one = random_factors(model, 2)
    before = logits(model, current=one)
    model(torch.ones(3, 300, dtype=torch.long))
    assert torch.equal(logits(model, current=one), before)


def test_an_interrupt_between_two_sets_of_factors_is_no_mixture(llama: Pair, model: EngineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = random_factors(model, 2), random_factors(model, 2, seed=1)
    logits(model, current=one)
    write, calls = Tensors.write, []

    def interrupted(self: object, pointer: int, values: object) -> None:
        calls.append(pointer)
        if len(calls) == 5:
            raise KeyboardInterrupt
        write(self, pointer, values)

    with monkeypatch.context() as patch:
        patch.setattr(Tensors, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model, current=two)
    close(logits(model, current=two), expected(llama, two))


def test_two_engines_of_one_file_are_independent(llama: Pair, model: EngineModel, opened: Opened) -> None:
    other, one, two = opened(llama), random_factors(model, 2), random_factors(model, 2, seed=1)
    first, second = logits(model, current=one), logits(other, current=two)
    close(first, expected(llama, one))
    close(second, expected(llama, two))
    assert torch.equal(logits(model, current=one), first)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_many_changes_and_engines_leak_nothing(llama: Pair, opened: Opened) -> None:
    model = opened(llama)
    sets = [random_factors(model, rank, seed=rank) for rank in (1, 2, 2, 3)]
    ids = np.arange(3, dtype=np.int32)
    rows = [Row(ids, ids, 0 * ids, ids[2:])]

    def change(times: int) -> None:
        for time in range(times):
            model.engine.set_factors({}, sets[time % 4])
            model.engine.decode(rows)

    change(20)
    gc.collect()  # else files of earlier tests may be closed while these are counted
    open_files, memory = descriptors(), resident()
    change(300)
    assert descriptors() == open_files
    assert resident() - memory < 20 * 2**20
    before = descriptors()
    for _ in range(10):
        other = llama.engine()
        logits(other, current=random_factors(other, 2))
        other.engine.close()
        other.engine.close()
    del other  # its file is open as long as it is referred to
    gc.collect()
    assert descriptors() == before
    assert resident() - memory < 40 * 2**20
