"""How and where a parameter is stored: placement, precision, quantized and external layers, digests, and the structure of a model."""
