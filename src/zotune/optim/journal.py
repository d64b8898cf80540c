"""The journal: an append-only file of a run's coefficients, from which the run is replayed.

    header   b"ZOJ" and the format's version, a digit; u32 length, JSON, u32 CRC-32
    record   u8 type, u16 length, payload, u32 CRC-32 of the type, length and payload

A *step* record (type 1; type 4: with bfloat16 coefficients) holds the step, learning rates, mean loss, coefficients and skipped flags, in
about 30 bytes with one direction. An *event* record (type 2, deflated: type 3) is a JSON object: a change of the state between steps.
Numbers are little-endian.

Appending syncs to disk. A torn last record, the trace of a crash, is dropped on opening; damage anywhere else is an error that names the
record.
"""

from __future__ import annotations

import bisect
import json
import os
import struct
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

from zotune.io.atomic import whole_file
from zotune.optim.journal_records import (
    CRC,
    DEFLATED,
    EVENT,
    HEAD,
    LONGEST,
    Record,
    StepRecord,
    inflate,
    pack,
    pack_header,
    parse,
    read,
    read_header,
    unpack,
)

#: Bytes of events per deflated byte of theirs, over a journal, at most: runs have about 6.
MOST_INFLATED = 64


class Journal:
    """A journal open for appending. Its records stay on the disk.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal.zo"
        >>> journal = Journal.create(path, {"seed": 0})
        >>> journal.append(StepRecord(0, (1e-3,), 0.5, (0.25,), (False,)))
        >>> [record.coefficients for record in Journal.open(path).records()]
        [(0.25,)]
    """

    def __init__(self, path: Path, header: dict[str, Any], start: int) -> None:
        self.path = path
        self.header = header
        self._start = start
        self._ends, self._is_step = array("Q"), bytearray()  # of each record: its end in the file, whether it is a step
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
        path, blob = Path(path), pack_header(header)
        if path.exists():
            raise FileExistsError(f"{path} exists already; resume that run or choose another folder.")
        with whole_file(path) as draft:  # a kill leaves a whole header or none
            draft.write_bytes(blob)
        return cls(path, json.loads(json.dumps(header)), len(blob))

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
        with open(path, "rb") as file:
            journal = cls(path, *read_header(path, file))
            journal._scan(file)
        return journal

    def _scan(self, file: BinaryIO) -> None:
        """Check and count the records of a file that is at the first of them."""
        steps, size, groups = 0, os.fstat(file.fileno()).st_size, len(self.header.get("groups", [None]))
        deflated = inflated = 0
        while self.size < size:
            found = read(file)
            if found is None:
                # What one append can have left is no longer than one record.
                file.seek(self.size)
                data = file.read(LONGEST + 1)
                if len(data) > LONGEST or any(parse(data, later) for later in range(1, len(data))):
                    where = f"record {len(self._ends)} (after step {steps})"
                    raise ValueError(f"{self.path}: {where} is damaged; restore the file from a copy.")
                break  # torn: the last append did not finish
            kind, payload = found
            end = self.size + HEAD.size + len(payload) + CRC.size
            try:
                if kind == DEFLATED:
                    deflated += len(payload)
                    kind, payload = EVENT, inflate(payload)
                    inflated += len(payload)
                    if inflated > MOST_INFLATED * max(deflated, 1 << 10):
                        raise ValueError("events that unpack to more than a run writes")
                record = unpack(kind, payload, groups)
            except (ValueError, struct.error, RecursionError) as error:
                raise ValueError(f"{self.path}: record {len(self._ends)} does not parse ({error}).") from None
            if isinstance(record, StepRecord):
                if record.step != steps:
                    raise ValueError(f"{self.path}: record {len(self._ends)} is step {record.step} where step {steps} was due.")
                steps += 1
            self._note(record, end)

    def append(self, record: Record) -> None:
        """Write a record through to the disk.

        Raises:
            OSError: it could not be written; the file is then as before, or ends in a torn record that opening drops.
        """
        blob = pack(record)
        end = self.size
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY)
            self._closer = weakref.finalize(self, os.close, self._file)
        self._check_in_place(self._file)
        os.ftruncate(self._file, end)  # whatever an append that failed has left
        if os.pwrite(self._file, blob, end) != len(blob):
            raise OSError(f"{self.path}: the disk took only part of a record; free some space and resume.")
        os.fsync(self._file)
        self._note(record, end + len(blob))

    def _check_in_place(self, file: int) -> None:
        """OSError where the open file is no longer the one of this name: what is written to it would be lost."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(file)):
            raise OSError(f"{self.path} was deleted, moved or replaced while a run was writing to it: the run ends; start it again.")

    def _note(self, record: Record, end: int) -> None:
        self._ends.append(end)
        self._is_step.append(isinstance(record, StepRecord))

    def records(self) -> Records:
        """All records in order: :class:`StepRecord` or, for events, a dict."""
        return Records(self, range(len(self._ends)))

    def read(self, number: int) -> Record:
        """The record with this number, from the disk.

        Raises:
            ValueError: it is damaged; it was intact when the journal was opened.
        """
        with open(self.path, "rb") as file:
            return next(self._read(file, range(number, number + 1)))

    def _read(self, file: BinaryIO, numbers: range) -> Iterator[Record]:
        groups = len(self.header.get("groups", [None]))
        for number in numbers:
            file.seek(self._ends[number - 1] if number else self._start)
            found = read(file)
            if found is None:
                raise ValueError(f"{self.path}: record {number} is damaged; restore the file from a copy.")
            yield unpack(*found, groups)

    def iterate(self, numbers: range) -> Iterator[Record]:
        """The records of these numbers, one in memory at a time."""
        with open(self.path, "rb") as file:
            yield from self._read(file, numbers)

    @property
    def size(self) -> int:
        """Bytes of the header and all complete records."""
        return self._ends[-1] if self._ends else self._start

    def __len__(self) -> int:
        """The number of steps."""
        return self._is_step.count(1)

    def after(self, size: int) -> Records:
        """The records beyond the first ``size`` bytes of the file."""
        return Records(self, range(bisect.bisect_right(self._ends, size), len(self._ends)))

    def drop(self, count: int) -> None:
        """Cut off the last ``count`` records."""
        if count:
            self._keep(len(self._ends) - count)

    def truncate(self, steps: int) -> None:
        """Keep the first ``steps`` steps, and the events before them.

        Raises:
            ValueError: there are fewer.
        """
        if steps > len(self):
            raise ValueError(f"{self.path} holds {len(self)} steps, fewer than the {steps} it is to be cut to.")
        places = [number for number, is_step in enumerate(self._is_step) if is_step]
        self._keep(places[steps - 1] + 1 if steps else 0)

    def _keep(self, keep: int) -> None:
        del self._ends[keep:], self._is_step[keep:]
        self.close()
        with open(self.path, "r+b") as file:
            file.truncate(self.size)
            os.fsync(file.fileno())

    def close(self) -> None:
        if self._closer is not None:
            self._closer()
        self._file = self._closer = None


class Records(Sequence[Record]):
    """Records of a journal that are on the disk: read when they are asked for, one in memory at a time.

    Args:
        journal: the journal.
        numbers: of the records in it.
    """

    def __init__(self, journal: Journal, numbers: range) -> None:
        self._journal, self._numbers = journal, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self._journal, self._numbers[index])
        return self._journal.read(self._numbers[index])

    def __iter__(self) -> Iterator[Record]:
        return self._journal.iterate(self._numbers)


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
