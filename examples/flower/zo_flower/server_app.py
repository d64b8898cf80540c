"""The server: averages the clients' records, takes the steps too, and compares all weights at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from logging import INFO
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

import zotune
from zo_flower.task import digest_of, model_of, optimizer_of
from zotune.optim import federated

app = ServerApp()


class Federation:
    """The steps of a run so far, and which of them each client has.

    Args:
        optimizer: the server's.
        grid: of the clients.
    """

    def __init__(self, optimizer: zotune.ZerothOrder, grid: Grid) -> None:
        self.optimizer, self.grid = optimizer, grid
        self.records: list[federated.StepRecord] = []
        self.steps_of: dict[int, int] = {}

    def ask(self, kind: str, nodes: Iterable[int]) -> dict[int, ConfigRecord]:
        """Sends every client the steps that it has not taken; their replies."""
        messages = []
        for node in nodes:
            first = self.steps_of.get(node, 0)
            content = ConfigRecord({"first": first, "records": federated.packed(self.records[first:])})
            messages.append(Message(content=RecordDict({"round": content}), message_type=kind, dst_node_id=node))
        replies = {}
        for message in self.grid.send_and_receive(messages):
            if message.has_error():
                log(INFO, "client %s: %s", message.metadata.src_node_id, message.error.reason)
                continue
            reply = message.content.config_records["reply"]
            replies[message.metadata.src_node_id] = reply
            self.steps_of[message.metadata.src_node_id] = int(reply["steps"])
        return replies

    def round(self, nodes: Iterable[int]) -> federated.StepRecord | None:
        """One step by the records of these clients; None where none could propose one."""
        proposed, weights = [], []
        for reply in self.ask("train", nodes).values():
            if "record" in reply:
                proposed += federated.unpacked(bytes(reply["record"]), len(self.optimizer.param_groups))
                weights.append(int(reply["examples"]))
        if not proposed:
            return None
        record = federated.averaged(proposed, weights)
        federated.take(self.optimizer, [record])
        self.records.append(record)
        return record

    def differing(self, nodes: Iterable[int]) -> list[int]:
        """Clients whose weights are not the server's, bit for bit."""
        ours, nodes = digest_of(self.optimizer.model), list(nodes)
        replies = self.ask("query", nodes)
        behind = [node for node, reply in replies.items() if "digest" not in reply]
        replies |= self.ask("query", behind) if behind else {}
        return [node for node, reply in replies.items() if reply.get("digest") != ours]


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    model, _ = model_of(config)
    federation = Federation(optimizer_of(model, config, Path(str(config["journal"]))), grid)
    while not list(grid.get_node_ids()):
        time.sleep(1)
    for number in range(int(config["rounds"])):
        record = federation.round(grid.get_node_ids())
        if record is not None and number % 10 == 0:
            log(INFO, "round %s: loss %.4f", number, record.loss)
    wrong = federation.differing(grid.get_node_ids())
    if wrong:
        raise RuntimeError(f"clients {wrong} do not have the server's weights: they run other versions or another type of device.")
    log(INFO, "%s steps; all clients have the server's weights", federation.optimizer.steps)
