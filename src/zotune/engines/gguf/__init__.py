"""GGUF, the file format of llama.cpp: models, adapters, conversion. Needs the package `gguf` (`pip install "zotune[gguf]"`)."""
