"""Factors between plain SGD's η and that of other update rules and transformed coefficients."""

from __future__ import annotations

import math

import torch

from zotune.methods.coefficients import State
from zotune.methods.method import Method
from zotune.methods.rules import EMASGD, Rule, Sign


def rule_gain(rule: Rule, moment: float, directions: int, step: int = 1 << 20) -> float:
    """The factor of plain SGD's η for another rule: 1 − β under momentum; √(M/K) where a step is η whatever the size of ĝ (Adam).

    RMSprop's average starts at 0 and has seen ``step`` steps. The sign of a noisy ĝ, normal with the variance M/K, has the mean
    √(2/π) ∇ over its standard deviation.

    Raises:
        ValueError: the factor is not known for this rule.
    """
    names = {cls.__name__ for cls in rule.cls.__mro__}
    if rule.cls is EMASGD:
        return 1.0
    if rule.cls is torch.optim.SGD:
        return (1 - rule.options.get("momentum", 0.0)) / (1 - rule.options.get("dampening", 0.0))
    if names & {"Adam", "AdamW", "NAdam", "RAdam", "Adamax"}:
        return math.sqrt(moment / directions)
    if rule.cls is torch.optim.RMSprop:
        return math.sqrt(moment / directions * (1 - rule.options.get("alpha", 0.99) ** (step + 1)))
    if rule.cls is Sign:
        return math.sqrt(2 / math.pi * moment / directions)
    raise ValueError(
        f"learning rate 'auto' is not known for the update rule {rule.cls.__name__}; give a number, or use a method on SGD or Adam."
    )


def gain(
    method: Method, rule: Rule, moment: float, directions: int, eps: float, step: int = 1 << 20, shaping: State | None = None
) -> float:
    """The factor of plain SGD's η in a method's step number ``step``: coefficients of mean square ``moment``, K directions.

    Args:
        shaping: the state of the method's shaping.

    Raises:
        ValueError: the factor is not known for the method.
    """
    transforms, state = method.transforms, shaping or {}
    for transform in transforms:
        if transform.replaces_rule:
            return transform.gain(moment, directions, eps, state)
    scale = math.prod(transform.gain(moment, directions, eps, state) for transform in transforms)
    if any(transform.normalizes for transform in transforms):
        return scale * rule_gain(rule, 1.0, 1, step)
    return scale * rule_gain(rule, moment, directions, step)


def measurable(method: Method) -> bool:
    """Whether ``lr="auto"`` is known for a method."""
    try:
        gain(method, Rule(method.update_rule, method.update_rule_args), 1.0, 1, 1.0)
    except ValueError:
        return False
    return True
