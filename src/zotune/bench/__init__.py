"""Experiments: a resumable grid of models, tasks, schemes, methods, hyperparameters and seeds, and its report."""

from zotune.bench.grid import Grid, load

__all__ = ["Grid", "load"]
