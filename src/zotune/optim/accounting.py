"""The ε that steps of Poisson-sampled Gaussian noise spend, by the accountant of the package ``dp-accounting``.

It composes privacy loss distributions (1911.04014, connect-the-dots discretization 2207.04380), whose ε is an upper bound that is tight to
a fraction of a percent.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

#: Neighboring data sets, as the accountant names them.
NEIGHBORS = {"add-or-remove": "ADD_OR_REMOVE_ONE", "replace-one": "REPLACE_ONE"}
#: Least and largest noise multiplier that are tried.
LEAST_NOISE, MOST_NOISE = 0.1, 1e5
#: Interval of the privacy losses by the least noise multiplier: little noise makes large losses, which take long on a fine grid.
INTERVALS = ((1.5, 1e-4), (0.0, 1e-3))
#: Rényi orders of a first guess.
ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256)
#: Relative distance to the least noise multiplier that does.
CLOSE = 1e-3


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError:
        raise ModuleNotFoundError(
            "differential privacy needs the package dp-accounting, which computes ε: pip install 'zotune[privacy]'.", name="dp_accounting"
        ) from None
    return dp_accounting


def _spent(accountant: Any, noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    library = _library()
    noise = library.GaussianDpEvent(noise_multiplier)
    accountant.compose(library.SelfComposedDpEvent(library.PoissonSampledDpEvent(rate, noise), steps))
    return float(accountant.get_epsilon(delta))


@cache
def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float, neighbors: str) -> float:
    """ε of ``steps`` steps at δ.

    Args:
        noise_multiplier: standard deviation of the noise over the largest length of an example's part of the sum.
        rate: probability of an example to be in a step.
        steps: how many.
        delta: δ.
        neighbors: one of :data:`NEIGHBORS`.
    """
    if steps == 0:
        return 0.0
    library = _library()
    relation = getattr(library.NeighboringRelation, NEIGHBORS[neighbors])
    interval = next(interval for above, interval in INTERVALS if noise_multiplier >= above)
    return _spent(library.pld.PLDAccountant(relation, interval), noise_multiplier, rate, steps, delta)


@cache
def noise_for(target: float, rate: float, steps: int, delta: float, neighbors: str) -> float:
    """The least noise multiplier, to one in a thousand, with which ``steps`` steps spend at most ε = ``target`` at δ.

    Raises:
        ValueError: no noise does.
    """
    library = _library()
    # Rényi accounting is fast, and loose on the safe side: it needs more noise.
    relation = library.NeighboringRelation.ADD_OR_REMOVE_ONE
    factor = 2.0 if neighbors == "replace-one" else 1.0  # a replacement is a removal and an addition

    def rough(sigma: float) -> float:
        return _spent(library.rdp.RdpAccountant(ORDERS, relation), sigma, rate, steps, delta)

    high = LEAST_NOISE
    while rough(high) > target / factor:
        high *= 2
        if high > MOST_NOISE:
            raise ValueError(f"no noise gives ε = {target:g} at δ = {delta:g} for {steps} steps: allow a larger ε.")
    while epsilon(high, rate, steps, delta, neighbors) > target:
        high *= 1.5
    low = high / 1.25
    while low > LEAST_NOISE and epsilon(low, rate, steps, delta, neighbors) <= target:
        low, high = low / 1.25, low
    while high / low > 1 + CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon(middle, rate, steps, delta, neighbors) <= target else (middle, high)
    return high
