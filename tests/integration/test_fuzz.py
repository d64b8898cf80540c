"""The fuzz driver finds what it looks for, and the readers pass a second of it."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
assert _SPEC is not None and _SPEC.loader is not None
fuzz: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


@pytest.mark.parametrize("reader", ["rows", "grid", "task", "tools"])
def test_a_reader_passes_a_second_of_fuzzing(reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.fuzz(reader, 1.0, 0, tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"{reader}: ")


def good(data: bytes) -> None:
    raise ValueError("a sentence")


def bug(data: bytes) -> None:
    raise KeyError("x")


def endless(data: bytes) -> None:
    while True:
        pass


def greedy(data: bytes) -> int:
    return len(bytearray(1 << 30))


def wordy(data: bytes) -> None:
    raise ValueError("")


@pytest.mark.parametrize(("read", "faulty"), [(good, False), (bug, True), (endless, True), (greedy, True), (wordy, False)])
def test_the_driver_tells_a_sentence_from_a_fault(read: Any, faulty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: bytes) -> None:
        time.sleep(0.05)
        read(data)

    monkeypatch.setitem(fuzz.TARGETS, "mine", lambda folder: fuzz.Target(lambda draw: Random.randbytes(draw, 4), slow))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 28)
    assert (fuzz.fuzz("mine", 0.2, 0, tmp_path) > 0) == faulty
    assert (tmp_path / "findings").exists() == faulty
