"""The client: evaluates the next step on its own data, and takes the steps that the server has averaged."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from zo_flower.task import Client, digest_of

app = ClientApp()
_CLIENTS: dict[int, Client] = {}  # by the number of their data


def client_of(context: Context) -> Client:
    partition, partitions = (int(context.node_config[name]) for name in ("partition-id", "num-partitions"))
    if partition not in _CLIENTS:
        _CLIENTS[partition] = Client(context.run_config, partition, partitions)
    return _CLIENTS[partition]


def answer(message: Message, client: Client, **values: int | bytes | str) -> Message:
    reply = ConfigRecord({"steps": client.optimizer.steps, **values})
    return Message(content=RecordDict({"reply": reply}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Takes the steps that it missed, and proposes the next one; without a proposal where it would need earlier ones."""
    client, sent = client_of(context), message.content.config_records["round"]
    if not client.follow(int(sent["first"]), bytes(sent["records"])):
        return answer(message, client)
    record, examples = client.propose()
    return answer(message, client, record=record, examples=examples)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Takes the last steps, and says which weights it has now."""
    client, sent = client_of(context), message.content.config_records["round"]
    if not client.follow(int(sent["first"]), bytes(sent["records"])):
        return answer(message, client)
    return answer(message, client, digest=digest_of(client.model))
