"""Memory tags: who allocates says what for, and in a step of any method everybody does."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import toys
from memory_models import MODELS
from zotune import baselines
from zotune.baselines import catalog
from zotune.io.memory_tags import memory_tag, recording_tags, tagged, tags
from zotune.memory import Ledger, Workload, measure
from zotune.memory.ledger import UntaggedError
from zotune.memory.shapes import shallow


@tagged("directions")
def inner() -> list[str]:
    return list(tags())


@tagged("logits")
def values():
    for _ in range(2):
        yield list(tags())


def test_the_innermost_tag_is_the_last_and_goes_with_its_block():
    with recording_tags():
        with memory_tag("activations"):
            assert inner() == ["activations", "directions"]
            assert tags() == ["activations"]
        assert tags() == []


def test_a_generator_is_tagged_only_while_it_makes_a_value():
    with recording_tags():
        for found in values():
            assert found == ["logits"] and tags() == []


def test_an_exception_takes_back_all_tags_inside():
    @tagged("update")
    def broken():
        memory_tag("host").__enter__()
        raise ValueError

    with recording_tags(), memory_tag("temporary"):
        with pytest.raises(ValueError):
            broken()
        assert tags() == ["temporary"]


def test_tags_belong_to_a_thread():
    found = []
    with recording_tags(), memory_tag("directions"):
        thread = threading.Thread(target=lambda: found.append(list(tags())))
        thread.start()
        thread.join()
    assert found == [[]]


def test_nothing_is_kept_while_nobody_listens():
    with memory_tag("directions"):
        assert tags() == [] == inner()
    assert list(values()) == [[], []]


def test_a_tag_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'direction' is no memory tag"):
        tagged("direction")


def test_a_strict_ledger_names_who_does_not_tag():
    ledger = Ledger(nn.Linear(2, 2), strict=True)
    with pytest.raises(UntaggedError, match="without a memory tag at"), ledger:
        ledger.begin_step()
        torch.ones(3)


@pytest.mark.filterwarnings("ignore:this model's attention kernel has no forward derivative")
@pytest.mark.parametrize("method", [*toys.names(), *baselines.names()])
def test_every_tensor_made_outside_of_the_model_is_tagged(method):
    """Real steps; the error names the file and line of an allocation without a tag."""
    smaller = {"rank": 64} if catalog.get(method).options.get("rank", 0) > 64 else {}  # than the model
    measure(Workload(shallow(MODELS["llama"], 1), catalog.get(method, **smaller), batch_size=4, sequence_length=8), strict=True)
