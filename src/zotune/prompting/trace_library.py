"""The library trace-opt (Trace and OptoPrime, 2406.16218), imported when a language model advises: :func:`trace_library`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

#: Clients of remote services that trace-opt imports, and that no local model needs.
CLIENTS = ("litellm", "openai")


class TraceLibrary(NamedTuple):
    """What is used of trace-opt: ``node``, ``bundle`` and the class ``OptoPrime``."""

    node: Any
    bundle: Any
    OptoPrime: Any

    def traced(self, function: Callable[..., Any], description: str) -> Any:
        """The function as an operator of a trace."""
        with _short_stack():
            return self.bundle(description=description)(function)


def trace_library() -> TraceLibrary:
    """The library; ModuleNotFoundError where it is not installed."""
    with _without_clients(), _short_stack(), redirect_stdout(io.StringIO()):  # it prints which client it would take
        trace, optimizers = importlib.import_module("opto.trace"), importlib.import_module("opto.optimizers")
    return TraceLibrary(trace.node, trace.bundle, optimizers.OptoPrime)


@contextmanager
def _without_clients() -> Iterator[None]:
    """Within the block empty modules stand for the clients that are not installed."""
    absent = [name for name in CLIENTS if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in absent:
        sys.modules[name] = _Absent(name)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def _short_stack() -> Iterator[None]:
    """Within the block `inspect.stack` gives the caller's two frames and no source.

    Each of trace-opt's operators asks it for its caller's variables; with the source of all frames, looked for in all modules that are
    loaded, the import takes 17 s beside transformers, and so 0.2 s.
    """
    usual = inspect.stack
    inspect.stack = lambda context=1: [SimpleNamespace(frame=sys._getframe(depth)) for depth in (1, 2)]  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        inspect.stack = usual


class _Absent(ModuleType):
    """A module that is not installed; its attributes are named in annotations and in functions that are not called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object
