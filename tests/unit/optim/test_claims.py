"""A model is free for another optimizer when its own has failed or is gone, and what cannot be written is refused before a step."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import toys
import zotune
from zotune.optim.journal import Journal


def trains(model: nn.Module) -> None:
    """Another optimizer takes a step on the model."""
    optimizer = zotune.ZerothOrder(model, toys.method("lozo"), lr=1e-2)
    optimizer.step(toys.loss_function(model), toys.batch(4, seed=0))
    optimizer.remove_hooks()


def test_a_constructor_that_fails_leaves_the_model_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.classifier()
    (tmp_path / "journal.zo").write_bytes(b"a run")
    with pytest.raises(FileExistsError):
        zotune.ZerothOrder(model, toys.method("lozo"), lr=1e-2, journal=tmp_path / "journal.zo")
    trains(model)
    with monkeypatch.context() as broken:
        broken.setattr("zotune.optim.construction.Evaluator", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            zotune.ZerothOrder(model, toys.method("lozo"), lr=1e-2)
    trains(model)


def test_an_optimizer_that_is_gone_leaves_its_updates() -> None:
    model, batch = toys.classifier(), toys.batch(4, seed=0)
    loss_fn = toys.loss_function(model)
    optimizer = zotune.ZerothOrder(model, toys.method("lozo"), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.step(loss_fn, batch)
    with pytest.raises(ValueError, match="already trained by another ZerothOrder"):
        zotune.ZerothOrder(model, toys.method("lozo"), lr=1e-2)
    with torch.no_grad():
        before = loss_fn(batch)
    del optimizer, scheduler
    other = zotune.ZerothOrder(model, toys.method("mezo"), lr=1e-2)
    with torch.no_grad():
        assert torch.allclose(loss_fn(batch), before, atol=1e-6), "the pending updates are in the weights now"
    other.remove_hooks()
    gc.collect()
    trains(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_has_the_updates_and_is_free(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = toys.classifier(), toys.batch(4, seed=0)
    optimizer = zotune.ZerothOrder(model, toys.method("lozo"), lr=1e-2)
    optimizer.step(toys.loss_function(model), batch)
    twin = copied(model)
    with torch.no_grad():
        assert torch.equal(toys.loss_function(twin)(batch), toys.loss_function(model)(batch))
    trains(twin)
    assert not any(module._forward_hooks or module._state_dict_hooks for module in twin.modules())
    optimizer.step(toys.loss_function(model), batch)
    optimizer.remove_hooks()


def test_a_replay_that_fails_leaves_the_model_free(tmp_path: Path) -> None:
    model = toys.classifier()
    optimizer = zotune.ZerothOrder(model, "lozo", lr=1e-2, journal=tmp_path / "journal.zo")
    optimizer.step(toys.loss_function(model), toys.batch(4, seed=0))
    optimizer.remove_hooks()
    journal = Journal.open(tmp_path / "journal.zo")
    journal.append({"event": "of another version"})
    journal.close()
    base = toys.classifier()
    with pytest.raises(ValueError, match="record 1 is none of a run of lozo"):
        zotune.replay(base, tmp_path / "journal.zo")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))
    trains(base)


def spoilt(kind: str) -> nn.Module:
    """A model whose last parameter cannot be written."""
    model = toys.classifier()
    name, parameter = list(model.named_parameters())[-1]
    owner = model.get_submodule(name.rpartition(".")[0])
    if kind == "expanded":
        data = torch.zeros(1).expand(parameter.shape)
    elif kind == "float8":
        data = parameter.detach().to(torch.float8_e4m3fn)
    elif kind == "meta":
        data = parameter.detach().to("meta")
    else:
        with torch.inference_mode():
            data = torch.zeros(parameter.shape)
    with torch.inference_mode(kind == "inference"):
        setattr(owner, name.rpartition(".")[2], nn.Parameter(data))
    return model


@pytest.mark.parametrize(
    ("kind", "said"),
    [("expanded", "share memory"), ("float8", "float8_e4m3fn"), ("meta", "meta device"), ("inference", "inference_mode")],
)
@pytest.mark.parametrize("method", ["mezo", "lozo"])
def test_a_weight_that_cannot_be_written_is_refused(kind: str, said: str, method: str, tmp_path: Path) -> None:
    model = spoilt(kind)
    name = list(dict(model.named_parameters()))[-1]
    with pytest.raises(ValueError, match=said) as told:
        zotune.ZerothOrder(model, toys.method(method), lr=1e-2, journal=tmp_path / "journal.zo")
    assert str(told.value).startswith(name) and not (tmp_path / "journal.zo").exists()
