"""Memory: what a step of training takes, predicted without weights or measured on real ones, and what for.

- :func:`estimate` rehearses the very steps that train, on tensors without data;
- :func:`measure` runs them;
- both give a :class:`Split`: bytes at the peak by :data:`KINDS`, from the same :class:`Ledger` of tensors.
"""

from zotune.memory.estimate import estimate, measure
from zotune.memory.ledger import KINDS, Ledger, Split
from zotune.memory.shapes import build, config_of, shipped
from zotune.memory.workload import Workload

__all__ = ["KINDS", "Ledger", "Split", "Workload", "build", "config_of", "estimate", "measure", "shipped"]
