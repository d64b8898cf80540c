"""The records of a journal (see :mod:`zotune.optim.journal`) as bytes, and the header."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate

#: Version of the format. A journal of another version is refused.
FORMAT = 4
MAGIC = b"ZOJ%d" % FORMAT
STEP, EVENT, DEFLATED, HALF_STEP = 1, 2, 3, 4
HEAD = struct.Struct("<BH")
CRC = struct.Struct("<I")
LONGEST = HEAD.size + 0xFFFF + CRC.size
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
#: Coefficients of a step that may be stored as bfloat16, where they are bfloat16 numbers.
MANY = 16
#: Bytes of a header, at most: 64 for each of a million parameters.
MOST_HEADER = 1 << 26


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
        numbers = (*estimate.coefficients.tolist(), *estimate.curvatures.tolist())
        return cls(
            step=step,
            lrs=rates,
            loss=float(torch.tensor(estimate.loss, dtype=torch.float32)),
            coefficients=numbers,
            skipped=tuple(itertools.islice(itertools.cycle(estimate.skipped), len(numbers))),
        )

    @classmethod
    def of(cls, values: Sequence[Any]) -> StepRecord:
        """A record that has been through JSON."""
        step, lrs, loss, coefficients, skipped = values
        return cls(step, tuple(lrs), loss, tuple(coefficients), tuple(skipped))


Record = StepRecord | dict[str, Any]


def pack(record: Record) -> bytes:
    """A record's bytes.

    Raises:
        ValueError: they are more than a record holds.
    """
    if isinstance(record, dict):
        kind, payload = EVENT, json.dumps(record, separators=(",", ":")).encode()
        if len(payload) <= 0xFFFF:
            deflater = zlib.compressobj(9, wbits=-15, zdict=_PHRASES)
            deflated = deflater.compress(payload) + deflater.flush()
            kind, payload = (DEFLATED, deflated) if len(deflated) < len(payload) else (kind, payload)
    else:
        count, lrs = len(record.coefficients), record.lrs
        if len(set(lrs)) == 1:
            lrs = lrs[:1]  # groups share a rate as a rule
        if len(lrs) > 0xFF:
            raise ValueError(f"a journal record holds at most {0xFF} learning rates, not {len(lrs)}; use fewer parameter groups.")
        kind, numbers = STEP, struct.pack(f"<{count}f", *record.coefficients)
        if count >= MANY and not any(numbers[0::4]) and not any(numbers[1::4]):  # bfloat16 numbers
            kind, numbers = HALF_STEP, _interleaved(numbers[2::4], numbers[3::4])
        payload = _STEP_HEAD.pack(record.step, record.loss, len(lrs), count, any(record.skipped))
        payload += struct.pack(f"<{len(lrs)}d", *lrs) + numbers
        if any(record.skipped):
            payload += bytes(record.skipped)
    if len(payload) > 0xFFFF:
        raise ValueError(f"a journal record holds at most {0xFFFF} bytes and this one has {len(payload)}; use fewer directions.")
    body = HEAD.pack(kind, len(payload)) + payload
    return body + CRC.pack(zlib.crc32(body))


def inflate(payload: bytes) -> bytes:
    """A deflated event.

    Raises:
        ValueError: it does not unpack to a record's bytes.
    """
    inflater = zlib.decompressobj(-15, zdict=_PHRASES)
    try:
        payload = inflater.decompress(payload, 0xFFFF)
    except zlib.error:
        raise ValueError("an event that does not unpack") from None
    if not inflater.eof or inflater.unused_data:
        raise ValueError("an event that does not unpack")
    return payload


def unpack(kind: int, payload: bytes, groups: int) -> Record:
    """The record of a payload; ``groups``: parameter groups of the run.

    Raises:
        ValueError, struct.error: no run writes such a payload.
    """
    if kind == DEFLATED:
        payload = inflate(payload)
    if kind in (EVENT, DEFLATED):
        event = json.loads(payload)
        if not isinstance(event, dict):
            raise ValueError("an event that is not an object")
        return event
    step, loss, num_lrs, count, any_skipped = _STEP_HEAD.unpack_from(payload)
    lrs = struct.unpack_from(f"<{num_lrs}d", payload, _STEP_HEAD.size) * (groups if num_lrs == 1 else 1)
    begin, size = _STEP_HEAD.size + 8 * num_lrs, 2 if kind == HALF_STEP else 4
    numbers = payload[begin : begin + size * count]
    if kind == HALF_STEP:
        zeros = bytes(count)
        numbers = _interleaved(zeros, zeros, numbers[0::2], numbers[1::2])
    coefficients = struct.unpack(f"<{count}f", numbers)
    skipped = tuple(map(bool, payload[-count:])) if any_skipped else (False,) * count
    return StepRecord(step, lrs, loss, coefficients, skipped)


def _interleaved(*columns: bytes) -> bytes:
    """The first byte of each of these, then the second, and so on."""
    rows = bytearray(len(columns) * len(columns[0]))
    for place, column in enumerate(columns):
        rows[place :: len(columns)] = column
    return bytes(rows)


def parse(data: bytes, position: int) -> tuple[int, bytes, int] | None:
    """(type, payload, end) of the intact record at ``position``, None if there is none."""
    if position + HEAD.size + CRC.size > len(data):
        return None
    kind, length = HEAD.unpack_from(data, position)
    end = position + HEAD.size + length + CRC.size
    if kind not in (STEP, EVENT, DEFLATED, HALF_STEP) or end > len(data):
        return None
    body = data[position : end - CRC.size]
    if zlib.crc32(body) != CRC.unpack_from(data, end - CRC.size)[0]:
        return None
    return kind, body[HEAD.size :], end


def read(file: BinaryIO) -> tuple[int, bytes] | None:
    """(type, payload) of the intact record that a file is at, None if there is none."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    parsed = parse(head + file.read(HEAD.unpack(head)[1] + CRC.size), 0)
    return None if parsed is None else parsed[:2]


def pack_header(header: dict[str, Any]) -> bytes:
    """The head of a journal's file.

    Raises:
        ValueError: the run has too many parameter groups.
    """
    if len(header.get("groups", ())) > MOST_GROUPS:
        raise ValueError(f"a journal is for at most {MOST_GROUPS} parameter groups; put parameters of one rate and decay in one group.")
    text = json.dumps(header, separators=(",", ":")).encode()
    return MAGIC + CRC.pack(len(text)) + text + CRC.pack(zlib.crc32(text))


def read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """(header, its bytes) of the journal that ``file`` begins.

    Raises:
        ValueError: not a journal of this version, or a damaged header.
    """
    begin = file.read(len(MAGIC) + CRC.size)
    if begin[:3] != MAGIC[:3] or len(begin) < len(MAGIC) + CRC.size:
        raise ValueError(f"{path} is not a zotune journal.")
    if begin[: len(MAGIC)] != MAGIC:
        which = "an earlier" if begin[3] < MAGIC[3] else "a later"
        raise ValueError(f"{path} was written by {which} version of zotune and cannot be replayed by this one; start the run anew.")
    length = CRC.unpack_from(begin, len(MAGIC))[0]
    text = file.read(min(length, MOST_HEADER))
    end = file.read(CRC.size)
    if len(text) < length or len(end) < CRC.size or zlib.crc32(text) != CRC.unpack(end)[0]:
        raise ValueError(f"{path}: the journal's header is damaged; this run cannot be resumed or replayed.")
    try:
        header = json.loads(text)
        if len(header.get("groups", [None])) > MOST_GROUPS:
            raise ValueError
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{path}: the journal's header does not parse; this is not a journal of this version of zotune.") from None
    return header, len(begin) + length + CRC.size
