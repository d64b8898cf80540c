"""First- and second-order methods, and the baselines without training: what zeroth-order methods are compared with.

They run under the same trainer, on the same data, with the same report. A recipe is a function of keyword options that returns a
:class:`Baseline`; its name on the command line is the function's, with hyphens: ``fo_adamw`` is ``fo-adamw``.
"""

from __future__ import annotations

from zotune.first_order.hybrid import Hybrid, optimizer_class
from zotune.first_order.optimizer import BackwardReport, FirstOrder
from zotune.first_order.recipes import adahessian, fo_adamw, fo_sgd, galore, golore, hybrid, mkor, mkor_h, scale, sgd_sai
from zotune.first_order.registry import get, names, options_of, recipe, register
from zotune.first_order.rival import Baseline
from zotune.first_order.untrained import icl, linear_probe, zero_shot

__all__ = [
    "BackwardReport",
    "Baseline",
    "FirstOrder",
    "Hybrid",
    "adahessian",
    "fo_adamw",
    "fo_sgd",
    "galore",
    "get",
    "golore",
    "hybrid",
    "icl",
    "linear_probe",
    "mkor",
    "mkor_h",
    "names",
    "optimizer_class",
    "options_of",
    "recipe",
    "register",
    "scale",
    "sgd_sai",
    "zero_shot",
]
