"""Third-party libraries print errors only, and a warning in one line."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_environment() -> None:
    """Silences start-up messages of third-party libraries, which read these variables when they are imported."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
    }.items():
        os.environ.setdefault(name, value)


def quiet_libraries() -> None:
    """Silences logs and progress bars of transformers, datasets and peft; a warning is one line."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.showwarning = _one_line


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"zotune: warning: {' '.join(str(message).split())}", file=file or sys.stderr)
