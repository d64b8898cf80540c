"""Several processes that train one model and tell each other losses alone."""

from zotune.distributed.agreement import WorkersDisagreeError
from zotune.distributed.sharing import BATCHES, MODES
from zotune.distributed.workers import Share, Workers, restarted

__all__ = ["BATCHES", "MODES", "Share", "Workers", "WorkersDisagreeError", "restarted"]
