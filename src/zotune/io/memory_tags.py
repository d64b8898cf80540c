"""Memory tags: what the tensors of a block of code are for, told by the code that allocates them.

A tag holds for all that runs inside of it; the innermost one counts. Tags are a stack for each thread. While nobody listens (see
:func:`listening`) a tagged function costs one comparison and a call, and a block two empty calls.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar, cast, get_args

#: What a tensor may be tagged as: a kind of memory; the memory of the host, whatever device the model is on; or something made in an
#: update, whose kind depends on how long it lives.
Tag = Literal["gradients", "activations", "directions", "logits", "temporary", "host", "update", "backward update", "model"]
TAGS: tuple[str, ...] = get_args(Tag)

F = TypeVar("F", bound=Callable[..., Any])


class _Tags(threading.local):
    """The tags of a thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[str] = []


_tags = _Tags()
_listeners = 0


class _Block:
    """A tag for the length of a block; whatever was left above it by an exception goes with it."""

    __slots__ = ("depth", "stack", "tag")

    def __init__(self, tag: str) -> None:
        self.tag, self.stack = tag, _tags.stack

    def __enter__(self) -> None:
        self.depth = len(self.stack)
        self.stack.append(self.tag)

    def __exit__(self, *error: object) -> None:
        del self.stack[self.depth :]


class _Nothing:
    """A block without a tag."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


_NOTHING = _Nothing()


class _Values:
    """An iterator that makes each of its values under a tag, and holds on to none of them."""

    __slots__ = ("close", "tag", "values")

    def __init__(self, values: Any, tag: str) -> None:
        self.values, self.tag, self.close = values, tag, values.close

    def __iter__(self) -> _Values:
        return self

    def __next__(self) -> Any:
        with _Block(self.tag):
            return next(self.values)


def memory_tag(tag: Tag) -> AbstractContextManager[None]:
    """For the length of a block, tensors are allocated for what ``tag`` says.

    Example:
        >>> with listening(), memory_tag("directions"):
        ...     tags()
        ['directions']
    """
    return _Block(tag) if _listeners else _NOTHING


def tagged(tag: Tag) -> Callable[[F], F]:
    """The decorator form of :func:`memory_tag`, for functions, methods and generator functions.

    Raises:
        ValueError: there is no such tag.
    """
    if tag not in TAGS:
        raise ValueError(f"{tag!r} is no memory tag; there are {', '.join(TAGS)}.")

    def decorate(function: F) -> F:
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                values = function(*args, **kwargs)
                return _Values(values, tag) if _listeners else values
        else:

            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                if not _listeners:
                    return function(*args, **kwargs)
                with _Block(tag):
                    return function(*args, **kwargs)

        return cast(F, call)

    return decorate


@contextmanager
def listening() -> Iterator[None]:
    """For the length of a block tags are kept, for :func:`tags` to read."""
    global _listeners
    _listeners += 1
    try:
        yield
    finally:
        _listeners -= 1
        if not _listeners:
            _tags.stack.clear()


def tags() -> Sequence[str]:
    """This thread's tags, the innermost last; not to be changed."""
    return _tags.stack


def push(tag: Tag) -> None:
    """A tag from here to :func:`pop`: for hooks, which are told of a beginning and of an end."""
    _tags.stack.append(tag)


def pop() -> None:
    """Take back the innermost tag, if there is one."""
    if _tags.stack:
        _tags.stack.pop()
