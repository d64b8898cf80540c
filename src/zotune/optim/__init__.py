"""The zeroth-order optimizer: a step, its state, its journal, replay and merge."""
