"""Models larger than memory: blocks are loaded from host memory or disk as a forward reaches them.

A zeroth-order step only reads the weights, so only blocks that an update has written are saved.
"""

from zotune.weights.offload.blocks import NotOffloadable
from zotune.weights.offload.loading import offload
from zotune.weights.offload.stream import Stream, stream_of

__all__ = ["NotOffloadable", "Stream", "offload", "stream_of"]
