"""Baselines: first- and second-order methods, and methods without training, to compare zeroth-order methods with.

They run under the same trainer, on the same data, with the same report. A recipe is a function of keyword options that returns a
:class:`Baseline`; its name on the command line is the function's, with hyphens: ``fo_adamw`` is ``fo-adamw``.
"""

from __future__ import annotations

from zotune.baselines.baseline import Baseline
from zotune.baselines.first_order import BackwardReport, FirstOrder
from zotune.baselines.hybrid import Hybrid, optimizer_class
from zotune.baselines.recipes import adahessian, fo_adamw, fo_sgd, galore, golore, hybrid, mkor, mkor_h, scale, sgd_sai
from zotune.baselines.registry import get, names, options_of, recipe, register
from zotune.baselines.untrained import icl, linear_probe, zero_shot

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
