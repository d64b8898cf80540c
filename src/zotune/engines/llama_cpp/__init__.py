"""llama.cpp as an engine, by the low-level interface of llama-cpp-python."""
