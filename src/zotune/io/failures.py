"""Errors as one sentence and an exit code: :func:`explain`.

Exit codes: 0 done; 1 the run failed (a non-finite loss, out of memory, processes that differ); 2 the request was wrong; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import re

from zotune.io.text import shortened

#: Most characters of a sentence, against values of a file that are quoted in it.
LONGEST = 2000
FAILED, WRONG, INTERRUPTED = 1, 2, 130
#: Package -> the extra of zotune that installs it.
_EXTRAS = {
    "peft": "peft",
    "tensorboard": "tensorboard",
    "pytorch_optimizer": "optimizers",
    "gguf": "gguf",
    "llama_cpp": "gguf",
    "opto": "trace",
    "black": "trace",
    "graphviz": "trace",
}


def explain(error: BaseException) -> tuple[str, int] | None:
    """The sentence and exit code of an interruption or of an error that the user can act on; None for a bug."""
    text = shortened(" ".join(str(error).split()), LONGEST)
    number = re.search(r"\(os error (\d+)\)", text)
    if number and not isinstance(error, OSError):  # of a library in Rust, such as tokenizers
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, KeyboardInterrupt):
        return text or "Interrupted.", INTERRUPTED
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get(error.name or "")
        hint = f" Install it with `pip install 'zotune[{extra}]'`." if extra else ""
        return f"this needs the package {error.name!r}, which is not installed.{hint}", WRONG
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        place = "" if error.filename is None else f" ({_name(error)})"
        return f"{error.strerror}{place}: free some space; a run that had begun goes on with --resume_from_checkpoint true.", WRONG
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {_name(error)}", WRONG
    if isinstance(error, ValueError | OSError | ImportError):
        return text or type(error).__name__, WRONG
    if type(error).__name__ == "SafetensorError":  # also for a full disk
        return f"a safetensors file cannot be read or written ({text}): give another file, or free some space.", WRONG
    if type(error).__name__ in ("NonFiniteLossError", "RankMismatchError", "LostWorkerError", "ChildFailedError"):
        return text, FAILED
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        if isinstance(error, MemoryError) and text:
            return text, FAILED
        return "out of memory; a smaller --per_device_train_batch_size, --max_length or --dtype bfloat16 needs less.", FAILED
    return None


def _name(error: OSError) -> str:
    return shortened(str(os.fspath(error.filename)), LONGEST // 4)
