"""Clients with data of their own take the same steps, and send records of a few bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import zotune
from zotune.optim import federated
from zotune.optim.journal_records import StepRecord

OPTIONS = {"lr": 1e-2, "seed": 4}


def module(width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def loss_of(model: nn.Module) -> Callable[[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    return lambda batch: (model(batch[0]) - batch[1]).square().mean(dim=1)


def batch_of(seed: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, 1, generator=generator)


@pytest.mark.parametrize(("method", "options"), [("mezo", {}), ("lozo-m", {"interval": 3})])
def test_clients_and_server_have_the_same_weights(method: str, options: dict[str, int], tmp_path: Path) -> None:
    """Those of a replay of the server's journal, also of a client that missed rounds; what is sent does not grow with the model."""
    sizes = set()
    for width in (8, 64):
        models = [module(width) for _ in range(3)]
        journal = tmp_path / f"{width}.zo"
        server, *clients = [
            zotune.ZerothOrder(model, zotune.methods.get(method, eps=1e-3, **options), journal=None if place else journal, **OPTIONS)
            for place, model in enumerate(models)
        ]
        history: list[StepRecord] = []
        for step in range(8):
            there = clients if step % 3 else clients[:1]
            for client in there:
                federated.take(client, history[client.steps :])
            sent = [
                federated.packed([federated.propose(client, loss_of(client.model), batch_of(9 * step + number))])
                for number, client in enumerate(there)
            ]
            sizes |= set(map(len, sent))
            history.append(federated.averaged([federated.unpacked(each)[0] for each in sent], [6] * len(sent)))
            federated.take(server, federated.unpacked(federated.packed(history[-1:])))
        for client in clients:
            federated.take(client, history[client.steps :])
        base = module(width)
        zotune.replay(base, journal).remove_hooks()
        for optimizer in (server, *clients):
            optimizer.remove_hooks()
        for name, wanted in base.state_dict().items():
            assert all(torch.equal(model.state_dict()[name], wanted) for model in models), name
        assert not torch.equal(base[0].weight, module(width)[0].weight)
    assert len(sizes) == 1 and sizes.pop() < 64


def test_a_round_is_the_step_on_all_data() -> None:
    batches = [batch_of(1, 6), batch_of(2, 2)]
    found = []
    for batch in [*batches, tuple(map(torch.cat, zip(*batches, strict=True)))]:
        optimizer = zotune.ZerothOrder(module(), zotune.methods.mezo(eps=1e-2), **OPTIONS)
        before = [p.clone() for p in optimizer.model.parameters()]
        found.append(federated.propose(optimizer, loss_of(optimizer.model), batch))
        assert optimizer.steps == 0 and all(map(torch.equal, before, optimizer.model.parameters()))
    mean = federated.averaged(found[:2], [6, 2])
    assert mean.coefficients == pytest.approx(found[2].coefficients, rel=1e-3) and mean.loss == pytest.approx(found[2].loss, rel=1e-5)
    failed = found[0]._replace(skipped=(True,), loss=float("nan"))
    assert federated.averaged([failed, found[1]]) == found[1], "a client without a finite loss does not count"


def test_what_cannot_be_federated_is_refused() -> None:
    def optimizer(method: object, **options: object) -> zotune.ZerothOrder:
        return zotune.ZerothOrder(module(), method, **{**OPTIONS, **options})  # type: ignore[arg-type]

    plain = zotune.methods.mezo(eps=1e-3)
    for refused, reason in (
        (optimizer("lozo-e"), "cannot be federated"),
        (optimizer("hizoo"), "cannot be federated"),
        (optimizer(zotune.methods.mezo(eps="auto")), "cannot be federated"),
        (optimizer(plain, lr="auto"), "give lr and eps as numbers"),
    ):
        with pytest.raises(ValueError, match=reason):
            federated.propose(refused, loss_of(refused.model), batch_of(0))
    ready = optimizer(plain)
    record = federated.propose(ready, loss_of(ready.model), batch_of(0))
    data = bytearray(federated.packed([record]))
    with pytest.raises(ValueError, match="does not follow 0 steps"):
        federated.take(ready, [record._replace(step=3)])
    with pytest.raises(ValueError, match="not of one round"):
        federated.averaged([record, record._replace(step=1)])
    data[9] ^= 1
    with pytest.raises(ValueError, match="damaged at byte 0"):
        federated.unpacked(bytes(data))
