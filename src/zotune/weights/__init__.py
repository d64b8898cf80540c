"""How and where a parameter is stored: placement, precision, quantized and external layers, digests, and the structure of a model."""

from zotune.io.lazy import submodules

__getattr__ = submodules(__name__, "external_linear", "offload", "quantized_linear", "trainable_scales")
