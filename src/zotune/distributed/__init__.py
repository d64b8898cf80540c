"""Several processes that train one model and tell each other losses alone."""

from zotune.distributed.sharing import BATCHES, MODES
from zotune.distributed.workers import Share, Workers, restarted
from zotune.errors import WorkersDisagreeError

__all__ = ["BATCHES", "MODES", "Share", "Workers", "WorkersDisagreeError", "restarted"]
