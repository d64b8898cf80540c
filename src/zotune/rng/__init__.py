"""Reproducible random directions, and the isolation of torch's global generators."""
