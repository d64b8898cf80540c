"""Exceptions that users catch."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had no finite loss to learn from."""


class RankMismatchError(RuntimeError):
    """Workers of one run are not in the same state."""


class LostWorkerError(RuntimeError):
    """Another worker of the run has failed or ended; its own message says why."""


class NotBatchableError(Exception):
    """Something cannot be evaluated at several points in one forward; the message says what."""
