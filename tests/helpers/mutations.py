"""Inputs for a fuzz run: good ones altered, and ones without end."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

JUNK: list[Any] = [
    None, True, 0, -1, 1, 3, 1.5, float("nan"), float("inf"), 10**30, 2**31, 20_000, 10**9, "", "x", "{x}", "{", "../../x", "/etc/passwd",
    [], ["a"], [[]], [None], {}, {"a": 1}, {"a": {"b": []}}, "--seed", "a\nb", "(([a-z]+)*)*!", "pissa_niter_1000000000", "1:" * 50_000,
    "a" * 100_000, "{s}" * 30_000, list(range(3000)), {str(n): n for n in range(3000)}, "\ud800", "\0", "auto", "é\u202e",
]  # fmt: skip
TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b" ", b"\t", b"\\", b"0", b"9", b"-", b"e", b"&a ", b"*a", b"<<: ", b"!!", b"!!int ",
    b"? ", b"- ", b"|", b">", b"'", b"#", b"%", b"null", b"true", b"1:", b"1_", b"0x", b"\xff", b"\x00", b"\xed\xa0\x80", b"\\ud800",
    b"{% for a in range(99999) %}", b"{% endfor %}", b"{{ ", b" }}", b"{%", b"%}", b"{% macro f() %}", b"9**9**9", b"'x' * 2 ** 33",
    b"messages", b".__class__", b"{{ messages }}", b"a: ", b"{}\n", b"\n\n",
]  # fmt: skip


def altered(seed: bytes, others: Sequence[bytes], draw: Random) -> bytes:
    """A good input with a few bytes changed, cut, doubled, or exchanged for a piece of another."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 6)):
        at = draw.randint(0, len(data))
        size = min(len(data) - at, draw.choice((1, 2, 8, 40, 200)))
        match draw.randrange(7):
            case 0:
                data[at : at + size] = draw.randbytes(size)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * draw.choice((1, 2, 50))
            case 3:
                data[at:at] = draw.choice(TOKENS)
            case 4:
                data[at:at] = draw.choice(TOKENS) * draw.choice((2, 30, 1000, 30_000))
            case 5:
                other = draw.choice(others)
                start = draw.randint(0, len(other))
                data[at : at + size] = other[start : start + draw.randint(0, 200)]
            case 6 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
    return bytes(data)


def endless(draw: Random) -> bytes:
    """Tokens, again and again."""
    some = draw.choices(TOKENS, k=draw.randint(1, 4))
    body = b"".join(some) * draw.choice((1, 100, 10_000, 60_000))
    return draw.choice((b"", b"a: ", b'{"a": ', b"[")) + body[:400_000]


def exchanged(content: Any, draw: Random, junk: Sequence[Any] = JUNK) -> Any:
    """A JSON or YAML document with some values exchanged, added or dropped."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        paths = _paths(content)
        if not paths:
            break
        *path, last = draw.choice(paths)
        inner = content
        for key in path:
            inner = inner[key]
        if draw.random() < 0.15:
            del inner[last]
        elif draw.random() < 0.1 and isinstance(inner, dict):
            inner[draw.choice(("x", "trust_remote_code", "", "name", "label"))] = copy.deepcopy(draw.choice(junk))
        else:
            inner[last] = copy.deepcopy(draw.choice(junk))
    return content


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if len(path) > 8:
        return []
    items = list(value.items())[:50] if isinstance(value, dict) else list(enumerate(value))[:50] if isinstance(value, list) else []
    return [path] * bool(path) + [found for key, each in items for found in _paths(each, (*path, key))]


def documents(seeds: Sequence[Any], dump: Callable[[Any], str]) -> Callable[[Random], bytes]:
    """Altered documents: by their values, their bytes, or without end."""
    written = [dump(seed).encode("utf-8", "replace") for seed in seeds]

    def draw_one(draw: Random) -> bytes:
        kind = draw.random()
        if kind < 0.55:
            return dump(exchanged(draw.choice(seeds), draw)).encode("utf-8", "replace")
        return altered(draw.choice(written), written, draw) if kind < 0.9 else endless(draw)

    return draw_one


def as_json(value: Any) -> str:
    """JSON with the surrogates of texts as they are."""
    return json.dumps(value)


def texts(seeds: Sequence[bytes]) -> Callable[[Random], bytes]:
    """Altered bytes, or without end."""
    return lambda draw: altered(draw.choice(seeds), seeds, draw) if draw.random() < 0.9 else endless(draw)
