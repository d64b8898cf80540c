"""Untrusted patterns and templates, run within limits of processor time and memory: :class:`Limited`."""

from __future__ import annotations

import os
import signal
import warnings
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: Processor seconds of a call.
SECONDS = 10.0
#: Bytes that a call may allocate.
MEMORY = 1 << 30


class LimitError(ValueError):
    """A call took more time or memory than it may."""


class Limited(Generic[T]):
    """A function that runs in a child process, which is stopped when a call exceeds its limits.

    The child is forked at the first call. Where processes cannot fork (Windows), the function runs without limits.

    Args:
        function: its arguments and results are pickled; an exception becomes a ValueError with its text.
        what: the subject of the message about a limit, such as ``"the chat template"``.
        seconds: processor time of a call.
        memory: bytes that a call may allocate.

    Raises:
        LimitError: by a call that exceeds a limit. ValueError: by a call whose function raises.

    Example:
        >>> with Limited(len, "it") as length:
        ...     length("four")
        4
    """

    def __init__(self, function: Callable[..., T], what: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.function, self.what, self.seconds, self.memory = function, what, seconds, memory
        self._pipe: Connection | None = None
        self._stop: Callable[[], Any] = lambda: None

    def __enter__(self) -> Limited[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any) -> T:
        if not hasattr(os, "fork"):
            return self.function(*args)
        pipe = self._pipe or self._start()
        try:
            pipe.send(args)
            good, result = pipe.recv()
        except (EOFError, OSError):
            self.close()
            limits = f"{self.seconds:g} s of processor time or {self.memory >> 20} MiB of memory"
            raise LimitError(f"{self.what} takes more than {limits}, so it is refused.") from None
        except BaseException:  # an interruption: the next answer would be that of this call
            self.close()
            raise
        if not good:
            raise ValueError(result)
        return result

    def close(self) -> None:
        """Ends the child; a later call starts another."""
        self._stop()
        self._pipe = None

    def _start(self) -> Connection:
        here, there = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child runs the function alone, none of the threads' code
            child = os.fork()
        if child == 0:
            _serve(there, self.function, self.what, self.seconds, self.memory)
        there.close()
        self._pipe = here
        self._stop = weakref.finalize(self, _end, here, child, os.getpid())
        return here


def _end(pipe: Connection, child: int, parent: int) -> None:
    if os.getpid() != parent:  # a fork of the parent, whose child this is not
        return
    pipe.close()
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _serve(pipe: Connection, function: Callable[..., Any], what: str, seconds: float, memory: int) -> None:
    """The life of the child: answers calls until its parent ends."""
    try:
        os.closerange(3, pipe.fileno())  # locks and pipes of the parent end with the parent
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
        for number in (signal.SIGTERM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory(memory)
        while True:
            args = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = _answer(function, args, what)
            pipe.send(answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        os._exit(0)


def _answer(function: Callable[..., Any], args: Any, what: str) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except MemoryError:
        os._exit(1)
    except RecursionError:
        return False, f"{what} is nested too deeply."
    except Exception as error:
        return False, " ".join(str(error).split())[:500] or type(error).__name__


def _limit_memory(more: int) -> None:
    import resource

    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
    except (OSError, ValueError):  # no /proc: only the processor time is limited
        pass
