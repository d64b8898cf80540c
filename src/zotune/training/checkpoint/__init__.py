"""Checkpoints: what a folder holds, how it is written, and whether it is whole."""
