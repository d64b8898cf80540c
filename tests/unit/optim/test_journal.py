"""Law 5: the journal replays, and knows when it is damaged."""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import struct
import tracemalloc
import zlib

import pytest
import torch
from torch import nn

import toys
from zotune import Journal, ZerothOrder, methods, replay
from zotune.optim.calibration import layer_scales
from zotune.optim.calibration.calibrator import INTERVAL
from zotune.optim.journal import verify
from zotune.optim.journal_records import FORMAT, MAGIC, StepRecord
from zotune.optim.preparation import STATE_EVERY
from zotune.weights.digest import digest


def records(count: int) -> list[StepRecord]:
    return [StepRecord(i, (1e-3 / (i + 1),), 0.5, (0.25 * i, -1.5), (False, i == 2)) for i in range(count)]


def written(path, count: int = 6) -> Journal:
    journal = Journal.create(path, {"seed": 0, "groups": [1]})
    for record in records(count):
        journal.append(record)
    return journal


def test_records_come_back_as_they_were(tmp_path):
    journal = written(tmp_path / "j")
    journal.append({"event": "fold"})
    again = Journal.open(tmp_path / "j")
    assert list(again.records()) == [*records(6), {"event": "fold"}] == list(journal.records())
    assert len(again) == 6 and again.header == {"seed": 0, "groups": [1]}


def test_learning_rates_of_several_groups(tmp_path):
    journal = Journal.create(tmp_path / "j", {"groups": [1, 2]})
    both = [StepRecord(0, (0.1, 0.1), 1.0, (1.0,), (False,)), StepRecord(1, (0.1, 0.2), 1.0, (1.0,), (False,))]
    for record in both:
        journal.append(record)
    assert list(Journal.open(tmp_path / "j").records()) == both


def test_a_torn_last_record_is_dropped_at_every_length(tmp_path):
    path = tmp_path / "j"
    written(path)
    whole = path.read_bytes()
    start = Journal.open(path)._ends[-2]
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal.open(path)
        assert list(journal.records()) == records(5)
    journal.append(records(6)[5])
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error_that_names_the_record(tmp_path):
    path = tmp_path / "j"
    ends = written(path)._ends
    whole = path.read_bytes()
    for record, position in enumerate(ends[:-1]):
        for offset in range(1, 12):
            damaged = bytearray(whole)
            damaged[position - offset] ^= 0x55
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"record {record} "):
                Journal.open(path)
            assert not verify(path).ok


def test_a_record_cut_out_is_noticed(tmp_path):
    path = tmp_path / "j"
    ends = written(path)._ends
    whole = path.read_bytes()
    path.write_bytes(whole[: ends[1]] + whole[ends[2] :])
    with pytest.raises(ValueError, match="step 3 where step 2 was due"):
        Journal.open(path)


@pytest.mark.parametrize("content", [b"", b"ZOJ", b"not a journal at all", MAGIC + b"\xff\xff\xff\xff{}"])
def test_what_is_not_a_journal_is_refused(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(ValueError, match="journal"):
        Journal.open(tmp_path / "j")


@pytest.mark.parametrize(("version", "which"), [(FORMAT - 1, "an earlier"), (FORMAT + 1, "a later")])
def test_a_journal_of_another_version_is_refused(tmp_path, version, which):
    written(tmp_path / "j")
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(b"ZOJ%d" % version + content[len(MAGIC) :])
    message = f"was written by {which} version of zotune and cannot be replayed by this one; start the run anew"
    with pytest.raises(ValueError, match=message):
        Journal.open(tmp_path / "j")
    assert message in verify(tmp_path / "j").message


def test_the_header_says_its_version(tmp_path):
    ZerothOrder(toys.classifier(), "mezo", journal=tmp_path / "j")
    assert Journal.open(tmp_path / "j").header["format"] == FORMAT


def test_an_existing_journal_is_not_overwritten(tmp_path):
    written(tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(FileExistsError, match="resume that run"):
        Journal.create(tmp_path / "j", {})
    assert (tmp_path / "j").read_bytes() == before


def test_truncating_keeps_whole_steps(tmp_path):
    journal = written(tmp_path / "j")
    journal.truncate(4)
    assert list(Journal.open(tmp_path / "j").records()) == records(4)
    with pytest.raises(ValueError, match="fewer than the 5"):
        journal.truncate(5)
    journal.append(records(6)[4])
    assert list(Journal.open(tmp_path / "j").records()) == records(5)


def test_an_append_is_on_disk_before_the_update_counts(tmp_path, monkeypatch):
    model = toys.classifier()
    optimizer = ZerothOrder(model, "mezo", lr=1e-2, journal=tmp_path / "j")
    before = [p.detach().clone() for p in model.parameters()]

    def full(fd):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        optimizer.step(toys.loss_function(model), toys.batch())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and optimizer.steps == 0


def test_a_journal_of_20000_steps_stays_below_two_megabytes(tmp_path, monkeypatch):
    """From a real run with measured rates: as many records of each kind as 20,000 steps write, each as long as the longest of its kind."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.get("lozo-e", num_directions=1, eps="auto"), lr="auto", journal=tmp_path / "j")
    steps = STATE_EVERY + 1
    for step in range(steps):
        optimizer.step(toys.loss_function(model), toys.batch(16, seed=step))
    longest, found = {}, {}
    begin = optimizer.journal._start
    for record, end in zip(optimizer.journal.records(), optimizer.journal._ends, strict=True):
        kind = "step" if isinstance(record, StepRecord) else "state" if "state" in record else record["event"]
        longest[kind], found[kind] = max(end - begin, longest.get(kind, 0)), found.get(kind, 0) + 1
        begin = end
    assert len(record.coefficients) == 16

    def times(count: int) -> dict[str, int]:
        measured = [step for step in range(count) if not (step % INTERVAL and step & (step - 1))]
        kept = [step for step in measured if step % STATE_EVERY == 0]
        scaled = [step for step in range(count) if layer_scales.due(step, optimizer.method.subspace.interval)]
        return {"step": count, "eps": 1, "state": len(kept), "measured": len(measured) - len(kept), "scales": len(scaled)}

    planned = times(steps)
    more = found["measured"] - planned["measured"]  # where steps outran the last measurement
    assert found == planned | {"measured": found["measured"]} and 0 <= more < 10
    longest["scales"] *= 80 // len(optimizer.layers)  # a model of 80 blocks
    whole = sum(number * longest[kind] for kind, number in times(20_000).items())
    whole += more * longest["measured"] * 20_000 // steps
    assert whole + 50_000 < 2_000_000, "with 50 kB for the header of a large model"


def test_events_are_deflated_where_shorter_and_both_are_read(tmp_path):
    events = [{"event": "measured", "curvature": 1.25, "signal": 0.5}, {"a": 1}, {"event": "observed", "pieces": ["x" * 60_000]}]
    journal = Journal.create(tmp_path / "j", {})
    for event in events:
        journal.append(event)
    assert list(Journal.open(tmp_path / "j").records()) == events
    first = json.dumps(events[0], separators=(",", ":")).encode()
    assert journal._ends[0] - journal._start < len(first)
    plain = struct.pack("<BH", 2, len(first)) + first
    with open(tmp_path / "j", "ab") as file:
        file.write(plain + struct.pack("<I", zlib.crc32(plain)))
    assert list(Journal.open(tmp_path / "j").records()) == [*events, events[0]]


def test_an_event_that_unpacks_to_more_than_a_record_is_refused(tmp_path):
    Journal.create(tmp_path / "j", {}).close()
    deflater = zlib.compressobj(9, wbits=-15)
    bomb = deflater.compress(b'"' + b"x" * 10_000_000) + deflater.flush()
    body = struct.pack("<BH", 3, len(bomb)) + bomb
    with open(tmp_path / "j", "ab") as file:
        file.write(body + struct.pack("<I", zlib.crc32(body)))
    with pytest.raises(ValueError, match="record 0 does not parse"):
        Journal.open(tmp_path / "j")


def trained(method: methods.Method, dtype: torch.dtype, path, steps: int, weight_decay: float = 0.0):
    model = toys.classifier(dtype)
    base = copy.deepcopy(model)
    optimizer = ZerothOrder(model, method, lr=3e-3, seed=5, weight_decay=weight_decay, journal=path)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for step in range(steps):
        if step == 9:
            optimizer.flush_updates()
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
        schedule.step()
    return base, model, optimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "lozo", "lozo-m"])
def test_base_and_journal_are_the_trained_weights_bit_for_bit(name, dtype, weight_decay, tmp_path):
    options = {"interval": 7} if "interval" in methods.options(name) else {}
    base, model, _ = trained(methods.get(name, **options, num_directions=2), dtype, tmp_path / "j", 25, weight_decay)
    first = [p.detach().clone() for p in base.parameters()]
    optimizer = replay(base, tmp_path / "j")
    live, again = model.state_dict(), base.state_dict()
    assert all(torch.equal(live[key], again[key]) for key in live)
    optimizer.remove_hooks()
    assert all(torch.equal(live[key], value) for key, value in base.state_dict().items())
    assert all(not torch.equal(a, b) for a, b in zip(first, base.parameters(), strict=True))


@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "lozo", "lozo-m"])
def test_replay_until_a_step_is_the_run_stopped_there(name, tmp_path):
    options = {"interval": 7} if "interval" in methods.options(name) else {}
    method = methods.get(name, **options)
    base, _, _ = trained(method, torch.float32, tmp_path / "long", 25)
    journal = Journal.open(tmp_path / "long")
    shorter = toys.classifier()
    optimizer = ZerothOrder(shorter, method, seed=5)
    for record in journal.records():
        if optimizer.steps == 11:
            break
        optimizer.apply(record)
    replay(base, tmp_path / "long", until=11)
    assert all(torch.equal(a, b) for a, b in zip(shorter.state_dict().values(), base.state_dict().values(), strict=True))


def test_replay_refuses_another_base_and_a_missing_step(tmp_path):
    base, model, _ = trained(methods.mezo(), torch.float32, tmp_path / "j", 3)
    with pytest.raises(ValueError, match="not the one the journal starts from"):
        replay(model, tmp_path / "j")
    with pytest.raises(ValueError, match="holds 3 steps; step 4"):
        replay(base, tmp_path / "j", until=4)


def test_the_digest_sees_every_bit_name_and_dtype():
    model = toys.classifier()
    first = digest(model)
    assert digest(copy.deepcopy(model)) == first
    with torch.no_grad():
        model[1].bias[3] += 1e-7
    assert digest(model) != first != digest(toys.classifier(torch.bfloat16))


def test_records_stay_on_the_disk(tmp_path):
    """A journal in memory takes some bytes a record, whatever the records hold."""
    journal = Journal.create(tmp_path / "j", {"groups": [[]]})
    event = {"event": "observed", "step": 0, "pieces": [["w", "uint8", [30_000], 0, base64.b64encode(os.urandom(30_000)).decode()]]}
    for step in range(30):
        journal.append(event)
        journal.append(StepRecord(step, (1e-3,), 0.5, (0.25,), (False,)))
    tracemalloc.start()
    found = [Journal.open(tmp_path / "j"), journal.records()]
    assert [len(found[0]), len(found[1]), found[1][-1].step, found[1][2:4][0]] == [30, 60, 29, event]
    assert found[0].after(journal.size - 1)[0].step == 29 and not found[0].after(journal.size)
    assert sum(isinstance(record, StepRecord) for record in found[0].records()) == 30
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000  # of 1.2 MB on the disk: a few records and buffers


def test_events_that_unpack_to_more_than_a_run_writes_are_refused(tmp_path):
    journal = Journal.create(tmp_path / "j", {"groups": [[]]})
    for _ in range(200):
        journal.append({"event": "observed", "pieces": [[0] * 20_000]})
    assert journal.size < 40_000  # and 8 MB of JSON
    with pytest.raises(ValueError, match=r"record [0-9]+ does not parse .*unpack to more than a run writes"):
        Journal.open(tmp_path / "j")


def test_a_header_longer_than_the_file_is_damaged(tmp_path):
    (tmp_path / "j").write_bytes(MAGIC + (2**32 - 1).to_bytes(4, "little") + b"{}")
    with pytest.raises(ValueError, match="header is damaged"):
        Journal.open(tmp_path / "j")


def test_tensors_of_events_are_no_larger_than_their_weights(tmp_path):
    """Memory is not taken for a shape that no weight of the run has."""
    model = nn.Linear(4, 3)
    optimizer = ZerothOrder(model, "lozo-g", lr=1e-3)
    for name, shape in (("weight", [1 << 40]), ("nothing", [4]), ("weight", [-4, -4])):
        with pytest.raises(ValueError, match="no tensor of this run"):
            optimizer.apply({"event": "observed", "step": 0, "pieces": [[name, "uint8", shape, 0, "AAAA"]]})


def test_many_bfloat16_coefficients_take_two_bytes_each(tmp_path):
    journal = Journal.create(tmp_path / "j", {"groups": [[], []]})
    numbers = torch.randn(200, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    rounded = StepRecord(0, (1e-3, 2e-3), 0.5, (*numbers.tolist(), -0.0, math.inf), (False,) * 202)
    exact = StepRecord(1, (1e-3,), 0.5, (*numbers.tolist(), float(torch.tensor(0.1))), (False,) * 200 + (True,))
    sizes = []
    for record in (rounded, exact):
        before = journal.size
        journal.append(record)
        sizes.append(journal.size - before)
    assert sizes == [7 + 12 + 2 * 8 + 2 * 202, 7 + 12 + 8 + 5 * 201]
    again = list(Journal.open(tmp_path / "j").records())
    assert again == [rounded, exact._replace(lrs=(1e-3, 1e-3))]
    assert math.copysign(1, again[0].coefficients[200]) == -1
