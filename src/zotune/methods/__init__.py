"""Methods: named choices of subspace, direction, estimator and update rule, with the defaults of their papers.

A recipe is a function of keyword options that returns a :class:`Method`; once registered it has a name in
the command, the tests, the tables and the grids: the function's, with hyphens (``lozo_m`` is ``lozo-m``).
"""

from __future__ import annotations

from typing import Any

from zotune.methods.method import AUTO, Method
from zotune.methods.recipes.adaptive import bszo, meazo, r_adazo, zo_adamw, zo_rmsprop
from zotune.methods.recipes.blockwise import zo_block, zo_block_jacobi
from zotune.methods.recipes.cone import conmezo
from zotune.methods.recipes.dizo import dizo
from zotune.methods.recipes.evolution import es, es_ranks, fzoo, qes, randopt
from zotune.methods.recipes.forward_grad import forward_grad
from zotune.methods.recipes.hizoo import hizoo, hizoo_l
from zotune.methods.recipes.jaguar import jaguar_muon, jaguar_sign, zo_jaguar
from zotune.methods.recipes.loren import loren
from zotune.methods.recipes.lozo import agzo, lozo, lozo_e, lozo_g, lozo_m, zo_act
from zotune.methods.recipes.mezo import kerzoo, mezo, mezo_adam, mezo_greedy, mezo_gv, mezo_momentum
from zotune.methods.recipes.projected import p_gap, subzero, tezo, zo_mopi, zo_muon
from zotune.methods.recipes.pseuzo import pseuzo
from zotune.methods.recipes.replayed import replayed_adam, replayed_momentum
from zotune.methods.recipes.signs import zo_sgd_cons, zo_sgd_scalar_sign, zo_sgd_sign
from zotune.methods.recipes.sparse import sensitive_mezo, sparse_mezo, zo_sparse
from zotune.methods.recipes.svrg import mezo_svrg
from zotune.methods.registry import Recipe, base_of, get, names, options_of, recipe, register

options = options_of

__all__ = [
    "AUTO",
    "Method",
    "Recipe",
    "agzo",
    "base_of",
    "bszo",
    "conmezo",
    "default",
    "dizo",
    "es",
    "es_ranks",
    "forward_grad",
    "fzoo",
    "get",
    "hizoo",
    "hizoo_l",
    "jaguar_muon",
    "jaguar_sign",
    "kerzoo",
    "loren",
    "lozo",
    "lozo_e",
    "lozo_g",
    "lozo_m",
    "meazo",
    "mezo",
    "mezo_adam",
    "mezo_greedy",
    "mezo_gv",
    "mezo_momentum",
    "mezo_svrg",
    "names",
    "options",
    "options_of",
    "p_gap",
    "pseuzo",
    "qes",
    "r_adazo",
    "randopt",
    "recipe",
    "register",
    "replayed_adam",
    "replayed_momentum",
    "sensitive_mezo",
    "sparse_mezo",
    "subzero",
    "tezo",
    "zo_act",
    "zo_adamw",
    "zo_block",
    "zo_block_jacobi",
    "zo_jaguar",
    "zo_mopi",
    "zo_muon",
    "zo_rmsprop",
    "zo_sgd_cons",
    "zo_sgd_scalar_sign",
    "zo_sgd_sign",
    "zo_sparse",
]


def default(**options: Any) -> Method:
    """The default method of ``zotune train``."""
    return get("lozo-g", **options)
