"""Checkpoints: their files, how they are written, and whether they are whole."""
