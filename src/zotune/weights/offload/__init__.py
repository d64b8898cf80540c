"""Models larger than memory: their blocks come from host memory or disk while they are needed.

A zeroth-order step only reads the weights, so a model streams one way: nothing is sent back but what an update has changed.
"""

from zotune.weights.offload.blocks import NotOffloadable
from zotune.weights.offload.loading import offload
from zotune.weights.offload.stream import Stream, stream_of

__all__ = ["NotOffloadable", "Stream", "offload", "stream_of"]
