"""The client: evaluates the next step on its own data, and takes the steps that the server has averaged."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from zo_flower.task import Client, digest_of

app = ClientApp()
_CLIENTS: dict[tuple[int, int], Client] = {}  # those of this process, by run and number of their data


def client_of(context: Context) -> Client:
    """The client of these data; in a process that did not have it, made anew by the records that Flower keeps for it."""
    partition, partitions = (int(context.node_config[name]) for name in ("partition-id", "num-partitions"))
    kept = context.state.config_records.get("taken")
    records, key = b"" if kept is None else bytes(kept["records"]), (context.run_id, partition)
    if key not in _CLIENTS or _CLIENTS[key].records != records:
        _CLIENTS[key] = Client(context.run_config, partition, partitions)
        _CLIENTS[key].follow(0, records)
    return _CLIENTS[key]


def follow(client: Client, message: Message, context: Context) -> bool:
    """Takes the steps that the server sent, and has Flower keep them; False: earlier ones are missing."""
    sent = message.content.config_records["round"]
    complete = client.follow(int(sent["first"]), bytes(sent["records"]))
    context.state["taken"] = ConfigRecord({"records": client.records})
    return complete


def answer(message: Message, client: Client, **values: int | bytes | str) -> Message:
    reply = ConfigRecord({"steps": client.optimizer.steps, **values})
    return Message(content=RecordDict({"reply": reply}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Takes the steps that it missed, and proposes the next one; without a proposal where it would need earlier ones."""
    client = client_of(context)
    if not follow(client, message, context):
        return answer(message, client)
    record, examples = client.propose()
    return answer(message, client, record=record, examples=examples)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Takes the last steps, and says which weights it has now."""
    client = client_of(context)
    if not follow(client, message, context):
        return answer(message, client)
    return answer(message, client, digest=digest_of(client.model))
