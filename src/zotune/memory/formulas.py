"""The closed formulas of ZO-Bench (2402.11592) for peak memory, with weights and compute in half precision.

|x|: bytes of all parameters in full precision (4 each); |a|: bytes of the activations saved for the backward pass; subscript l: of a layer.
In full precision each ½ becomes 1.
"""

from __future__ import annotations

#: Method -> formula, as text.
FORMULAS = {
    "fo-sgd": "|x| + max(½|a| + ½|x|, |x|)",
    "fo-adamw": "|x| + max(½|a| + ½|x|, |x|) + 2|x|",
    "forward-grad": "2|x| + 2 max|a_l|",
    "mezo": "½|x| + max ½|x_l|",
    "mezo-momentum": "½|x| + max ½|x_l| + |x|",
    "mezo-adam": "½|x| + max ½|x_l| + 2|x|",
    "zo-adamw": "½|x| + max ½|x_l| + 2|x|",
    "zo-rmsprop": "½|x| + max ½|x_l| + |x|",
    "zo-sgd-sign": "½|x| + max ½|x_l|",
    "zo-sgd-cons": "½|x| + max ½|x_l|",
}


def closed_form(method: str, parameters: int, largest: int, activations: int, *, half: bool = True) -> int | None:
    """Bytes by the formula of a method; None for a method without one.

    Args:
        method: its name.
        parameters: elements of all parameters.
        largest: elements of the largest parameter.
        activations: bytes saved for the backward pass.
        half: weights and compute are in half precision; then |a| is twice ``activations``.

    Example:
        >>> closed_form("mezo", parameters=1000, largest=100, activations=0)
        2200
    """
    if method not in FORMULAS:
        return None
    x, saved = 4 * parameters, activations * (2 if half else 1)
    part = 0.5 if half else 1.0
    if method.startswith("fo-"):
        return round(x + max(part * saved + part * x, x) + (2 * x if method == "fo-adamw" else 0))
    if method == "forward-grad":
        return round(2 * x + 2 * saved)
    state = {"mezo-momentum": 1, "zo-rmsprop": 1, "mezo-adam": 2, "zo-adamw": 2}.get(method, 0)
    return round(part * x + part * 4 * largest + state * x)
