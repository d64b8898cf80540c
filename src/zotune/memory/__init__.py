"""The peak memory of training by kind, predicted without weights or measured.

- :func:`estimate` makes a dry run of the code that trains, on tensors without data;
- :func:`measure` runs it;
- both give a :class:`Split`: bytes at the peak by :data:`KINDS`, from the same :class:`Ledger` of tensors.
"""

from zotune.memory.estimate import estimate, measure
from zotune.memory.ledger import KINDS, Ledger, Split
from zotune.memory.shapes import build, config_of, shipped
from zotune.memory.workload import Workload

__all__ = ["KINDS", "Ledger", "Split", "Workload", "build", "config_of", "estimate", "measure", "shipped"]
