"""The journal: an append-only file of a run's coefficients, from which the run is replayed.

    header   b"ZOJ" and the format's version, a digit; u32 length, JSON, u32 CRC-32
    record   u8 type, u16 length, payload, u32 CRC-32 of the type, length and payload

A *step* record (type 1) holds the step, learning rates, mean loss, coefficients and skipped flags; about 30 bytes with one direction. An
*event* record (type 2, deflated: type 3) is a JSON object: a change of the state between steps. Numbers are little-endian.

Appending syncs to disk. A torn last record, the trace of a crash, is dropped on opening; damage anywhere else is an error that names the
record.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zotune.io.atomic import whole_file
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate

#: Version of the format. A journal of another version is refused.
FORMAT = 2
MAGIC = b"ZOJ%d" % FORMAT
_STEP, _EVENT, _DEFLATED = 1, 2, 3
_HEAD = struct.Struct("<BH")
_CRC = struct.Struct("<I")
_LONGEST = _HEAD.size + 0xFFFF + _CRC.size
_STEP_HEAD = struct.Struct("<IfBH?")
#: The dictionary that events are deflated with: part of the format, like the names of events and their entries.
_PHRASES = (
    b'"]]}{"event":"observed","step":,"pieces":[["{"event":"general_path","names":["{"event":"forward_batching","batched":false}'
    b'"spread":{"forgetting":0.25,"agreement":{"forgetting":0.15,"single":{"forgetting":0.1,"moment":{"forgetting":0.1,'
    b'"recent":{"forgetting":0.2,"count":0,"mean":0.0,"square":0.0},"units":1,"lowest":null,"brake":1.0}}'
    b'"state":{"curvature":{"forgetting":0.25,"count":,"mean":,"square":{"event":"eps","value":0.00'
    b'{"event":"scales","values":[0.,1.],"forwards":20,"sequences":{"event":"measured","curvature":,"signal":0.0,"moment":0.,'
    b'"brake":1.0,"forwards":3,"sequences":'
)
#: Parameter groups of a run, at most: in memory every step has a learning rate for each.
MOST_GROUPS = 1024


class StepRecord(NamedTuple):
    """Step number from 0; learning rate per parameter group; mean loss; coefficients c_k; skipped flags per direction."""

    step: int
    lrs: tuple[float, ...]
    loss: float
    coefficients: tuple[float, ...]
    skipped: tuple[bool, ...]

    @classmethod
    @tagged("activations")
    def of_estimate(cls, step: int, estimate: Estimate, rates: tuple[float, ...]) -> StepRecord:
        """The record of a step's estimate; curvatures follow the coefficients."""
        return cls(
            step=step,
            lrs=rates,
            loss=float(torch.tensor(estimate.loss, dtype=torch.float32)),
            coefficients=(*estimate.coefficients.tolist(), *estimate.curvatures.tolist()),
            skipped=estimate.skipped + estimate.skipped[: len(estimate.curvatures)],
        )

    @classmethod
    def of(cls, values: Sequence[Any]) -> StepRecord:
        """A record that has been through JSON."""
        step, lrs, loss, coefficients, skipped = values
        return cls(step, tuple(lrs), loss, tuple(coefficients), tuple(skipped))


Record = StepRecord | dict[str, Any]


def _pack(record: Record) -> bytes:
    if isinstance(record, dict):
        kind, payload = _EVENT, json.dumps(record, separators=(",", ":")).encode()
        if len(payload) <= 0xFFFF:
            deflater = zlib.compressobj(9, wbits=-15, zdict=_PHRASES)
            deflated = deflater.compress(payload) + deflater.flush()
            kind, payload = (_DEFLATED, deflated) if len(deflated) < len(payload) else (kind, payload)
    else:
        count, lrs = len(record.coefficients), record.lrs
        if len(set(lrs)) == 1:
            lrs = lrs[:1]  # groups share a rate as a rule
        if len(lrs) > 0xFF:
            raise ValueError(f"a journal record holds at most {0xFF} learning rates, not {len(lrs)}; use fewer parameter groups.")
        kind = _STEP
        payload = _STEP_HEAD.pack(record.step, record.loss, len(lrs), count, any(record.skipped))
        payload += struct.pack(f"<{len(lrs)}d{count}f", *lrs, *record.coefficients)
        if any(record.skipped):
            payload += bytes(record.skipped)
    if len(payload) > 0xFFFF:
        raise ValueError(f"a journal record holds at most {0xFFFF} bytes and this one has {len(payload)}; use fewer directions.")
    body = _HEAD.pack(kind, len(payload)) + payload
    return body + _CRC.pack(zlib.crc32(body))


def _unpack(kind: int, payload: bytes, groups: int) -> Record:
    if kind == _DEFLATED:
        inflater = zlib.decompressobj(-15, zdict=_PHRASES)
        payload = inflater.decompress(payload, 0xFFFF)
        if not inflater.eof or inflater.unused_data:
            raise ValueError("an event that does not unpack")
    if kind in (_EVENT, _DEFLATED):
        event = json.loads(payload)
        if not isinstance(event, dict):
            raise ValueError("an event that is not an object")
        return event
    step, loss, num_lrs, count, any_skipped = _STEP_HEAD.unpack_from(payload)
    numbers = struct.unpack_from(f"<{num_lrs}d{count}f", payload, _STEP_HEAD.size)
    lrs = numbers[:num_lrs] * (groups if num_lrs == 1 else 1)
    skipped = tuple(map(bool, payload[-count:])) if any_skipped else (False,) * count
    return StepRecord(step, lrs, loss, numbers[num_lrs:], skipped)


def _parse(data: bytes, position: int) -> tuple[int, bytes, int] | None:
    """(type, payload, end) of the intact record at ``position``, None if there is none."""
    if position + _HEAD.size + _CRC.size > len(data):
        return None
    kind, length = _HEAD.unpack_from(data, position)
    end = position + _HEAD.size + length + _CRC.size
    if kind not in (_STEP, _EVENT, _DEFLATED) or end > len(data):
        return None
    body = data[position : end - _CRC.size]
    if zlib.crc32(body) != _CRC.unpack_from(data, end - _CRC.size)[0]:
        return None
    return kind, body[_HEAD.size :], end


class Journal:
    """A journal open for appending.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal.zo"
        >>> journal = Journal.create(path, {"seed": 0})
        >>> journal.append(StepRecord(0, (1e-3,), 0.5, (0.25,), (False,)))
        >>> [record.coefficients for record in Journal.open(path).records()]
        [(0.25,)]
    """

    def __init__(self, path: Path, header: dict[str, Any], records: list[Record], ends: list[int], start: int) -> None:
        self.path = path
        self.header = header
        self._records = records
        self._ends = ends
        self._start = start
        self._file: int | None = None  # a descriptor, open from the first append on
        self._closer: weakref.finalize[..., Any] | None = None

    @classmethod
    def create(cls, path: str | Path, header: dict[str, Any]) -> Journal:
        """Start a journal.

        Raises:
            FileExistsError: there is one already.
            OSError: it could not be written; nothing is left behind.
            ValueError: the run has too many parameter groups.
        """
        path = Path(path)
        if len(header.get("groups", ())) > MOST_GROUPS:
            raise ValueError(f"a journal is for at most {MOST_GROUPS} parameter groups; put parameters of one rate and decay in one group.")
        text = json.dumps(header, separators=(",", ":")).encode()
        blob = MAGIC + _CRC.pack(len(text)) + text + _CRC.pack(zlib.crc32(text))
        if path.exists():
            raise FileExistsError(f"{path} exists already; resume that run or choose another folder.")
        with whole_file(path) as draft:  # a kill leaves a whole header or none
            draft.write_bytes(blob)
        return cls(path, json.loads(text), [], [], len(blob))

    @classmethod
    def open(cls, path: str | Path) -> Journal:
        """Open a journal; nothing is written until the first append, which also cuts off a torn last record.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a journal, or damaged before its last record; names the record.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no journal at {path}.")
        data = path.read_bytes()
        start = len(MAGIC) + _CRC.size
        if data[:3] != MAGIC[:3] or len(data) < start:
            raise ValueError(f"{path} is not a zotune journal.")
        if data[: len(MAGIC)] != MAGIC:
            which = "an earlier" if data[3] < MAGIC[3] else "a later"
            raise ValueError(f"{path} was written by {which} version of zotune and cannot be replayed by this one; start the run anew.")
        length = _CRC.unpack_from(data, len(MAGIC))[0]
        text = data[start : start + length]
        start += length + _CRC.size
        if len(data) < start or zlib.crc32(text) != _CRC.unpack_from(data, start - _CRC.size)[0]:
            raise ValueError(f"{path}: the journal's header is damaged; this run cannot be resumed or replayed.")
        try:
            header = json.loads(text)
            groups = len(header.get("groups", [None]))
            if groups > MOST_GROUPS:
                raise ValueError
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise ValueError(f"{path}: the journal's header does not parse; this is not a journal of this version of zotune.") from None
        records: list[Record] = []
        ends: list[int] = []
        position, steps = start, 0
        while position < len(data):
            parsed = _parse(data, position)
            if parsed is None:
                # What one append can have left is no longer than one record.
                if len(data) - position > _LONGEST or any(_parse(data, later) for later in range(position + 1, len(data))):
                    raise ValueError(f"{path}: record {len(records)} (after step {steps}) is damaged; restore the file from a copy.")
                break  # torn: the last append did not finish
            kind, payload, position = parsed
            try:
                record = _unpack(kind, payload, groups)
            except (ValueError, struct.error, zlib.error, RecursionError) as error:
                raise ValueError(f"{path}: record {len(records)} does not parse ({error}).") from None
            if isinstance(record, StepRecord):
                if record.step != steps:
                    raise ValueError(f"{path}: record {len(records)} is step {record.step} where step {steps} was due.")
                steps += 1
            records.append(record)
            ends.append(position)
        return cls(path, header, records, ends, start)

    def append(self, record: Record) -> None:
        """Write a record through to the disk.

        Raises:
            OSError: it could not be written; the file is then as before, or ends in a torn record that opening drops.
        """
        blob = _pack(record)
        end = self.size
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY)
            self._closer = weakref.finalize(self, os.close, self._file)
        self._check_in_place(self._file)
        os.ftruncate(self._file, end)  # whatever an append that failed has left
        if os.pwrite(self._file, blob, end) != len(blob):
            raise OSError(f"{self.path}: the disk took only part of a record; free some space and resume.")
        os.fsync(self._file)
        self._records.append(record)
        self._ends.append(end + len(blob))

    def _check_in_place(self, file: int) -> None:
        """OSError where the open file is no longer the one of this name: what is written to it would be lost."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(file)):
            raise OSError(f"{self.path} was deleted, moved or replaced while a run was writing to it: the run ends; start it again.")

    def records(self) -> Iterator[Record]:
        """All records in order: :class:`StepRecord` or, for events, a dict."""
        return iter(tuple(self._records))

    @property
    def size(self) -> int:
        """Bytes of the header and all complete records."""
        return self._ends[-1] if self._ends else self._start

    def __len__(self) -> int:
        """The number of steps."""
        return sum(isinstance(record, StepRecord) for record in self._records)

    def after(self, size: int) -> list[Record]:
        """The records beyond the first ``size`` bytes of the file."""
        return [record for record, end in zip(self._records, self._ends, strict=True) if end > size]

    def drop(self, count: int) -> None:
        """Cut off the last ``count`` records."""
        if count:
            self._keep(len(self._records) - count)

    def truncate(self, steps: int) -> None:
        """Keep the first ``steps`` steps, and the events before them.

        Raises:
            ValueError: there are fewer.
        """
        if steps > len(self):
            raise ValueError(f"{self.path} holds {len(self)} steps, fewer than the {steps} it is to be cut to.")
        keep = done = 0
        while done < steps:
            done += isinstance(self._records[keep], StepRecord)
            keep += 1
        self._keep(keep)

    def _keep(self, keep: int) -> None:
        del self._records[keep:], self._ends[keep:]
        self.close()
        with open(self.path, "r+b") as file:
            file.truncate(self.size)
            os.fsync(file.fileno())

    def close(self) -> None:
        if self._closer is not None:
            self._closer()
        self._file = self._closer = None


@dataclass(frozen=True)
class Summary:
    """What :func:`verify` found."""

    ok: bool
    steps: int
    message: str


def verify(path: str | Path) -> Summary:
    """Check a journal's checksums, order and end, without a model."""
    try:
        journal = Journal.open(path)
    except (ValueError, FileNotFoundError) as error:
        return Summary(False, 0, str(error))
    torn = Path(path).stat().st_size - journal.size
    tail = f", then {torn} bytes of a record that was not finished (dropped on resuming)" if torn else ""
    return Summary(True, len(journal), f"{len(journal)} steps intact{tail}.")
