"""The Flower app of examples/flower, with Flower's own messages and apps, in one process: see docs/how-to/other_loops.md."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import command_cases
import zotune
from docs_pages import ROOT

flwr_app = pytest.importorskip(
    "flwr.app", reason="Flower is not installed: its versions of protobuf, rich and typer are not those of zotune"
)


@pytest.fixture
def apps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples" / "flower")
    identity = importlib.import_module("flwr.supercore.task_identity")
    for name in ("run_id", "node_id", "task_id"):
        setattr(identity.TaskIdentity, name, 1)  # as the runtime does
    yield SimpleNamespace(**{name: importlib.import_module(f"zo_flower.{name}") for name in ("client_app", "server_app", "task")})
    for name in ("run_id", "node_id", "task_id"):
        setattr(identity.TaskIdentity, name, None)
    for name in [name for name in sys.modules if name.startswith("zo_flower")]:
        del sys.modules[name]


class LocalGrid(importlib.import_module("flwr.serverapp").Grid):
    """Hands messages to the ClientApp in this process, as Flower's own simulation does, and counts their bytes."""

    def __init__(self, app: Any, config: dict[str, Any], clients: int, forget: Any) -> None:
        self.app, self.sent, self.rounds, self.forget = app, 0, 0, forget
        self.contexts = {
            node: flwr_app.Context(0, node, {"partition-id": place, "num-partitions": clients}, flwr_app.RecordDict(), config)
            for place, node in enumerate(range(11, 11 + clients))
        }

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...

    def push_messages(self, messages: Iterable[Any]) -> Any: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Any: ...

    def get_node_ids(self) -> Iterable[int]:
        self.rounds += 1
        if self.rounds == 5:
            self.forget()  # new processes: Flower keeps the contexts alone
        return list(self.contexts)[: 1 if self.rounds % 3 == 0 else None]  # the second client is away at times

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        replies = []
        for message in messages:
            replies.append(self.app(message, self.contexts[message.metadata.dst_node_id]))
            for each in (message, replies[-1]):
                self.sent += sum(
                    len(value) for record in each.content.config_records.values() for value in record.values() if isinstance(value, bytes)
                )
        return replies


def test_flower_clients_end_in_the_servers_weights(apps: Any, tmp_path: Path) -> None:
    sent = []
    for width in (16, 32):
        command_cases.save_model(tmp_path / f"{width}", hidden_size=width)
        config = {"rounds": 6, "model": str(tmp_path / f"{width}"), "method": "lozo", "learning-rate": 1e-2, "eps": 1e-3, "seed": 0}
        config |= {"batch-size": 4, "journal": str(tmp_path / f"{width}.zo")}
        grid = LocalGrid(apps.client_app.app, config, 2, apps.client_app._CLIENTS.clear)
        grid.forget()
        apps.server_app.app(grid, flwr_app.Context(0, 1, {}, flwr_app.RecordDict(), config))
        base, _ = apps.task.model_of(config)
        before = [p.clone() for p in base.parameters()]
        optimizer = zotune.replay(base, config["journal"])
        assert optimizer.steps == 6 and len(apps.client_app._CLIENTS) == 2
        digests = [apps.task.digest_of(client.model) for client in apps.client_app._CLIENTS.values()]
        assert digests == [apps.task.digest_of(base)] * 2
        optimizer.remove_hooks()
        assert not all(map(torch.equal, before, base.parameters()))
        sent.append(grid.sent)
    assert sent[0] == sent[1] < 6 * 2 * 2 * 64
