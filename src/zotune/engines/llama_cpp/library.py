"""The C library: import with one clear sentence, its log, and the tensors that its evaluation callback shows."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

#: Lines of llama.cpp's log that are kept, for the reason of a failure.
KEPT = 40
#: ggml's number of float32.
FLOAT32 = 0

_log: deque[str] = deque(maxlen=KEPT)
_callback: Any = None  # llama.cpp calls it as long as the process lives


class Tensor(ctypes.Structure):
    """ggml's tensor, as ``ggml.h`` declares it."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


def load() -> Any:
    """The low-level module of llama-cpp-python, its log kept from the terminal.

    Raises:
        ValueError: it is not installed, or its library does not load.
    """
    global _callback
    try:
        import llama_cpp.llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            'a GGUF file is computed by llama.cpp, which is not installed here: pip install "zotune[gguf]" (it is compiled, with cmake '
            f"and a C++ compiler). The reason given: {' '.join(str(error).split())}"
        ) from None
    if _callback is None:
        _callback = lib.llama_log_callback(lambda level, text, data: _log.append(text.decode(errors="replace").rstrip()))
        lib.llama_log_set(_callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
    return lib


def last_words() -> str:
    """What the library last said of an error; empty for nothing."""
    said = [line for line in _log if "failed" in line.lower()]
    said += [line for line in _log if "error" in line.lower()]  # they give the reason
    return " ".join(said[-1].removeprefix("llama_model_load: ").split()).rstrip(".") if said else ""


def forget() -> None:
    """Drop what the library has said so far."""
    _log.clear()


@contextmanager
def raising() -> Iterator[None]:
    """Raise at the end of the block what was raised in a callback within it.

    While C runs, only callbacks run Python code: an interrupt by the user is raised in one of them. ctypes would report and drop it.
    """
    found: list[BaseException] = []
    before, thread = sys.unraisablehook, threading.get_ident()

    def caught(report: Any) -> None:
        if "ctypes callback" in (report.err_msg or "") and threading.get_ident() == thread:
            found.append(report.exc_value)
        else:
            before(report)

    sys.unraisablehook = caught
    try:
        yield
    finally:
        sys.unraisablehook = before
    if found:
        raise found[0]


class Tensors:
    """Reads and writes the tensors of an evaluation callback.

    Raises:
        ValueError: the library declares tensors otherwise than this module.
    """

    def __init__(self) -> None:
        from llama_cpp import _ggml

        self._lib = lib = _ggml.libggml
        for name, arguments, result in (
            ("ggml_backend_tensor_get", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None),
            ("ggml_backend_tensor_set", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None),
            ("ggml_get_name", [ctypes.c_void_p], ctypes.c_char_p),
            ("ggml_op_name", [ctypes.c_int], ctypes.c_char_p),
        ):
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, result
        self.product = next(op for op in range(256) if lib.ggml_op_name(op) == b"MUL_MAT")
        self._checked = False

    def at(self, pointer: int) -> Tensor:
        """The tensor at an address."""
        tensor = Tensor.from_address(pointer)
        if not self._checked:  # the name lies behind all other fields that are read
            if self._lib.ggml_get_name(pointer) != tensor.name:
                raise ValueError("this llama-cpp-python has tensors of another layout: install the version in zotune's constraints.txt.")
            self._checked = True
        return tensor

    def read(self, pointer: int) -> np.ndarray:
        """A float32 tensor of two dimensions as (rows, columns)."""
        tensor = Tensor.from_address(pointer)
        columns, rows = tensor.ne[0], tensor.ne[1] * tensor.ne[2] * tensor.ne[3]
        plain = tensor.type == FLOAT32 and tensor.nb[0] == 4 and tensor.nb[1] == 4 * columns
        assert plain and tensor.ne[2] == tensor.ne[3] == 1, f"{tensor.name!r} is no plain matrix of float32"
        found = np.empty((rows, columns), np.float32)
        self._lib.ggml_backend_tensor_get(pointer, found.ctypes.data, 0, found.nbytes)
        return found

    def write(self, pointer: int, values: np.ndarray) -> None:
        """Replace the elements of a tensor that was read."""
        values = np.ascontiguousarray(values, np.float32)
        self._lib.ggml_backend_tensor_set(pointer, values.ctypes.data, 0, values.nbytes)
