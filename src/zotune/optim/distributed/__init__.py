"""Several processes that train one model and tell each other losses alone."""

from zotune.errors import RankMismatchError
from zotune.optim.distributed.launch import restarted
from zotune.optim.distributed.partition import BATCHES, MODES
from zotune.optim.distributed.workers import Share, Workers

__all__ = ["BATCHES", "MODES", "RankMismatchError", "Share", "Workers", "restarted"]
