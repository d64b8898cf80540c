"""Protocols: what a paper's published code sets, as options of `zotune train`, one YAML file for each (``--protocol``)."""

from zotune.training.protocols.applied import Applied, Words, applied, place_of
from zotune.training.protocols.protocol import Place, Protocol, Settings, load, names

__all__ = ["Applied", "Place", "Protocol", "Settings", "Words", "applied", "load", "names", "place_of"]
