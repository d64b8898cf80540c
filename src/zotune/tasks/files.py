"""Rows of a file: JSON Lines, JSON, CSV, TSV, text, Parquet and Arrow."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from zotune.io.text import shortened
from zotune.tasks.rows import Lines, Rows, Table

#: Most bytes per line of a file of lines, against files that unpack to one endless line.
LONGEST_LINE = 1 << 26
#: Most bytes of a JSON file that is one list.
LONGEST_LIST = 1 << 31
#: Most bytes that a byte of a packed file may unpack to, after the first :data:`FREE_BYTES`; text unpacks to 2 to 30 times its bytes.
MOST_UNPACKED, FREE_BYTES = 100, 1 << 24
#: Most blank lines beside those that may follow rows.
MOST_BLANK = 1000
#: What a file may be.
KINDS = "JSON Lines (.jsonl), JSON (.json), CSV (.csv), TSV (.tsv), Parquet (.parquet), Arrow (.arrow) or lines of text (.txt)"

_OBJECTS = "one JSON object per line is expected"
_UNREAD = {".xls": "save it as CSV", ".xlsx": "save it as CSV", ".ods": "save it as CSV", ".zip": "unpack it", ".zst": "unpack it"}


def read_rows(path: str | Path) -> Rows:
    """The rows of a file, whose kind its name says (a name without a known ending: JSON Lines); ValueError where it is not one."""
    path = Path(path)
    kind = Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
    if path.is_file() and kind in _UNREAD:
        raise ValueError(f"{path} is read as no {kind} file: {_UNREAD[kind]}. A file is {KINDS}.")
    readers: dict[str, Callable[[Path], Rows]] = {
        ".csv": read_csv, ".tsv": partial(read_csv, delimiter="\t"), ".json": read_json, ".txt": read_texts,
        ".parquet": read_parquet, ".arrow": read_arrow,
    }  # fmt: skip
    return readers.get(kind, read_jsonl)(path)


def is_text_table(path: str | Path) -> bool:
    """Whether every value of a file's rows is a text, numbers too."""
    return ".csv" in (suffixes := [each.lower() for each in Path(path).suffixes[-2:]]) or ".tsv" in suffixes


def read_jsonl(path: str | Path, longest: int = LONGEST_LINE) -> Rows:
    """Rows of a JSON Lines file (UTF-8, one object per line, gzip for .gz), without blank lines; ValueError where it is not one.

    ``longest``: bytes of a line, at most.
    """
    found = _Found(Path(path))
    for number, line in _lines(found.path, _OBJECTS, longest):
        _object(line, found.path, number)
        found.add(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number)
    return found.rows(_OBJECTS)


def read_json(path: str | Path) -> Rows:
    """Rows of a JSON file with one list of objects, as LLaMA-Factory has them; of any other file as of JSON Lines."""
    path = Path(path)
    with _readable(path, _OBJECTS), _opened(path) as file:
        start = next((each for line in iter(lambda: file.readline(1 << 16), b"") if (each := line.strip())), b"")
        if not start.removeprefix(b"\xef\xbb\xbf").startswith(b"["):
            return read_jsonl(path)
        file.seek(0)
        content = file.read(LONGEST_LIST + 1)
    if len(content) > LONGEST_LIST:
        raise ValueError(f"{path} is longer than {LONGEST_LIST} bytes: write one JSON object per line (.jsonl).")
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not valid JSON ({error.msg} at column {error.colno}).") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} holds what cannot be read ({' '.join(str(error).split())[:160]}).") from None
    found = _Found(path, "row")
    for number, row in enumerate(values):
        if not isinstance(row, dict) or not row:
            raise ValueError(f"{path}, row {number} is no object with columns: {shortened(repr(row), 80)}.")
        found.add(_bytes(row, f"{path}, row {number}"), number)
    return found.rows("a list of JSON objects is expected")


def read_csv(path: str | Path, delimiter: str | None = None) -> Rows:
    """Rows of a CSV file with a header, each value a text; ValueError where it is not one.

    Columns without a name (the index that pandas writes) are left out.

    Args:
        path: UTF-8, quotes as in RFC 4180, gzip for .gz.
        delimiter: None: a comma, or of a header without one a semicolon or a tab.
    """
    found, start = _Found(Path(path)), 1
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        texts = _texts(found.path)
        first = next(texts, "")
        if delimiter is None:
            delimiter = next((each for each in ",;\t" if each in first), ",")
        reader = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                break
            if not any(value.strip() for value in values):
                continue
            if header is None:
                header = _header(values, found.path)
            elif len(values) != len(header):
                raise ValueError(
                    f"{found.path}, line {start} has {len(values)} values, and the header has {len(header)} columns: put a text that "
                    f"contains {delimiter!r} or a line break in quotes."
                )
            else:
                row = {name: value for name, value in zip(header, values, strict=True) if name}
                found.add(_bytes(row, f"{found.path}, line {start}"), start)
    except csv.Error as error:
        raise ValueError(f"{found.path}, line {start} is not valid CSV ({error}): a quote within a quoted text is written twice.") from None
    finally:
        csv.field_size_limit(limit)
    return found.rows("a header, and one row per line are expected")


def read_texts(path: str | Path) -> Rows:
    """Rows of a text file: each line that is not blank is one text, as in transformers' examples."""
    found = _Found(Path(path))
    for number, line in enumerate(_texts(found.path), 1):
        if line.strip():
            found.add(_bytes({"text": line.rstrip("\r\n")}, f"{path}, line {number}"), number)
    return found.rows("one text per line is expected")


def read_parquet(path: str | Path) -> Rows:
    """Rows of a Parquet file."""
    from pyarrow import parquet

    return _table(Path(path), "Parquet", parquet.read_table)


def read_arrow(path: str | Path) -> Rows:
    """Rows of an Arrow file, in the stream's or the file's format."""
    import pyarrow as pa

    def read(source: str) -> Any:
        with pa.memory_map(source) as file:
            try:
                return pa.ipc.open_stream(file).read_all()
            except pa.ArrowInvalid:
                file.seek(0)
                return pa.ipc.open_file(file).read_all()

    return _table(Path(path), "Arrow", read)


def _table(path: Path, kind: str, read: Callable[[str], Any]) -> Rows:
    import datasets  # slow to import, and not needed for lines
    import pyarrow as pa

    _check_is_file(path)
    try:
        data = datasets.Dataset(datasets.table.InMemoryTable(read(str(path))))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as {kind} ({shortened(' '.join(str(error).split()), 160)}).") from None
    if not len(data) or not data.column_names:
        raise ValueError(f"{path} holds no rows.")
    return Rows(Table(data), str(path), range(len(data)), unit="row")


class _Found:
    """Rows that are read, as bytes."""

    def __init__(self, path: Path, unit: str = "line") -> None:
        self.path, self.unit = path, unit
        self.data, self.ends, self.numbers = bytearray(), array("Q"), array("Q")

    def add(self, line: bytes, number: int) -> None:
        self.data += line
        self.ends.append(len(self.data))
        self.numbers.append(number)

    def rows(self, expected: str) -> Rows:
        """ValueError where there are none."""
        if not self.ends:
            raise ValueError(f"{self.path} holds no rows: {expected}.")
        return Rows(Lines(self.data, self.ends), str(self.path), self.numbers, self.unit)


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file is expected: give a folder with a data set as --dataset_name.")
    if not path.is_file():
        raise ValueError(f"no file {path}: give the path of a file of rows, {KINDS}.")


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


@contextmanager
def _readable(path: Path, expected: str) -> Iterator[None]:
    """ValueError where a file is not there, or cannot be read or unpacked."""
    _check_is_file(path)
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked as gzip ({error}): compress it again, or drop the .gz.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None


def _lines(path: Path, expected: str, longest: int = LONGEST_LINE, *, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line, packed or not; ``blank``: blank ones too."""
    with (
        _readable(path, expected),
        path.open("rb") as raw,
        gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else nullcontext(raw) as lines,
    ):
        size, checked, count = 0, FREE_BYTES, 0
        for number, line in enumerate(iter(lambda: lines.readline(longest + 1), b""), start=1):
            size += len(line)
            if len(line) > longest:
                raise ValueError(f"{path}, line {number} is longer than {longest} bytes: {expected}.")
            if size > checked:
                if size > MOST_UNPACKED * max(raw.tell(), 1):
                    raise ValueError(f"{path} unpacks to more than {MOST_UNPACKED} times its bytes: unpack it if you trust it.")
                checked = size + FREE_BYTES // 16
            count += bool(line.strip())
            if number - count > count + MOST_BLANK:
                raise ValueError(f"{path} has more blank lines than rows: {expected}.")
            if blank or line.strip():
                yield number, line


def _texts(path: Path) -> Iterator[str]:
    for number, line in _lines(path, "a text per line is expected", blank=True):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number} is not UTF-8 text: save the file as UTF-8.") from None


def _header(values: Iterable[str], path: Path) -> list[str]:
    names = [value.strip() for value in values]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} has two columns named {twice!r}: rename one.")
    return names


def _bytes(row: Mapping[str, Any], where: str) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text.") from None


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
        row = json.loads(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {number} is not UTF-8 text: save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not valid JSON ({error.msg} at column {error.colno}).") from None
    except UnicodeEncodeError:
        raise ValueError(f"{path}, line {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text.") from None
    except RecursionError:
        raise ValueError(f"{path}, line {number} is nested too deeply.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path}, line {number} holds a number that cannot be read ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(
            f'{path}, line {number} holds a {type(row).__name__}, not an object such as {{"prompt": "...", "completion": "..."}}.'
        )
    if not row:
        raise ValueError(f"{path}, line {number} holds an object without columns.")
    return row
