"""What third-party libraries may print while a command runs: their errors, and one line for a warning."""

from __future__ import annotations

import logging
import sys
import warnings


def quiet_libraries() -> None:
    """Turns down transformers', datasets' and peft's logs and progress bars, and prints warnings as one line."""
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
