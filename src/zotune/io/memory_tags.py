"""Memory tags: the code that allocates tensors states their purpose, for a memory ledger.

A tag holds for everything that runs inside its block; the innermost tag counts. Each thread has its own stack of tags. Without a ledger
(:func:`recording_tags`) a tagged function costs one comparison and one call. Tag functions that allocate, not every layer: functions called
inside of a model's modules count as activations anyway.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar, cast, get_args

#: A kind of memory; "host": memory of the host, whatever the model's device; or something made in an update, whose kind depends on how long
#: it lives.
Tag = Literal["gradients", "activations", "directions", "logits", "temporary", "host", "update", "backward update", "model"]
TAGS: tuple[str, ...] = get_args(Tag)

F = TypeVar("F", bound=Callable[..., Any])


class _Tags(threading.local):
    """The tags of a thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[str] = []


_tags = _Tags()
_ledgers = 0
_NOTHING = nullcontext()


class _Block:
    """A tag for the length of a block; leaving it also drops tags that an exception left above it."""

    __slots__ = ("depth", "stack", "tag")

    def __init__(self, tag: str) -> None:
        self.tag, self.stack = tag, _tags.stack

    def __enter__(self) -> None:
        self.depth = len(self.stack)
        self.stack.append(self.tag)

    def __exit__(self, *error: object) -> None:
        del self.stack[self.depth :]


class _Values:
    """An iterator that generates each of its values under a tag, and keeps no reference to them."""

    __slots__ = ("close", "tag", "values")

    def __init__(self, values: Any, tag: str) -> None:
        self.values, self.tag, self.close = values, tag, values.close

    def __iter__(self) -> _Values:
        return self

    def __next__(self) -> Any:
        with _Block(self.tag):
            return next(self.values)


def memory_tag(tag: Tag) -> AbstractContextManager[None]:
    """For the length of a block, tensors are allocated for the purpose ``tag``.

    Example:
        >>> with recording_tags(), memory_tag("directions"):
        ...     tags()
        ['directions']
    """
    return _Block(tag) if _ledgers else _NOTHING


def tagged(tag: Tag) -> Callable[[F], F]:
    """The decorator form of :func:`memory_tag`, for functions, methods and generator functions.

    Raises:
        ValueError: there is no such tag.
    """
    if tag not in TAGS:
        raise ValueError(f"{tag!r} is no memory tag; there are {', '.join(TAGS)}.")

    def decorate(function: F) -> F:
        generates = inspect.isgeneratorfunction(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not _ledgers:
                return function(*args, **kwargs)
            if generates:
                return _Values(function(*args, **kwargs), tag)
            with _Block(tag):
                return function(*args, **kwargs)

        return cast(F, call)

    return decorate


@contextmanager
def recording_tags() -> Iterator[None]:
    """For the length of a block tags are recorded, for :func:`tags` to read."""
    global _ledgers
    _ledgers += 1
    try:
        yield
    finally:
        _ledgers -= 1
        if not _ledgers:
            _tags.stack.clear()


def tags() -> Sequence[str]:
    """This thread's tags, the innermost last; read-only."""
    return _tags.stack


def push(tag: Tag) -> None:
    """Set a tag until :func:`pop`: for hooks at the beginning and the end of a module."""
    _tags.stack.append(tag)


def pop() -> None:
    """Remove the innermost tag, if there is one."""
    if _tags.stack:
        _tags.stack.pop()
