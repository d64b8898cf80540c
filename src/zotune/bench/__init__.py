"""Experiments: a grid of models, tasks, schemes, methods, hyperparameters and seeds, run to the end whatever interrupts it; its report."""

from zotune.bench.grid import Grid, load

__all__ = ["Grid", "load"]
