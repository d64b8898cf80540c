"""Update rules: any ``torch.optim.Optimizer`` class, given one parameter's estimate at a time, and rules that torch lacks.

A rule never sees the model: for each coordinate it takes the value θ (float32) and the estimate ĝ, and returns the new value. Each
coordinate has an optimizer object of its own with a single parameter, so no two estimates are in memory together. Rules that couple
parameters (D-Adaptation, LAMB's global norm) therefore see each parameter alone.
"""

from __future__ import annotations

from zotune.methods.rules.ema import EMASGD, RAdaZO
from zotune.methods.rules.jaguar import JaguarMuon, JaguarSign, PersistentSign
from zotune.methods.rules.lookup import OWN_RULES, resolve
from zotune.methods.rules.orthogonal import Orthogonal, PartialOrthogonal, orthogonalized
from zotune.methods.rules.rule import FIRST_MOMENTS, Rule, is_plain_sgd
from zotune.methods.rules.sign import Sign

__all__ = [
    "EMASGD",
    "FIRST_MOMENTS",
    "OWN_RULES",
    "JaguarMuon",
    "JaguarSign",
    "Orthogonal",
    "PartialOrthogonal",
    "PersistentSign",
    "RAdaZO",
    "Rule",
    "Sign",
    "is_plain_sgd",
    "orthogonalized",
    "resolve",
]
