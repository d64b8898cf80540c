"""The model at θ + offset, evaluated without writing to any weight."""

from zotune.io.lazy import submodules

__getattr__ = submodules(__name__, "layers")
