"""The choice of ε: coefficients are measured at a ladder of ε, and the largest ε that agrees with its neighbor is taken.

Below the right range coefficients are rounding noise; above it they follow the curvature of the loss.

Rewards of generated texts jump where a token changes. There ε has to reach other texts: it is the one at which the log-probability of a
given token changes by about :data:`NATS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from zotune.errors import NonFiniteLossError
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimator

#: The values of ε that are tried; where climbing begins in well-behaved single precision.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RUNG = 2
#: Directions that the ladder is measured along, and those of the first learning rate.
LADDER_DIRECTIONS, FIRST_DIRECTIONS = 2, 8
#: Number of the first direction that measurements use, beyond those of any step.
DIRECTION = 1 << 24
#: Relative error of the coefficients that a larger ε may bring: small beside that of a random direction, which is 100%.
TOLERANCE = 0.03
#: Root mean square change of a token's log-probability, in nats, at the ε of generated texts.
NATS = 0.35
#: The values of ε between which it is sought, each three times the one before.
REACHES = (1e-3 / 9, 1e-3 / 3, 1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2, 0.243, 0.729)
#: Losses of the batch at θ + scale · Z_direction, (n,).
At = Callable[[float, int], Tensor]


@tagged("activations")
def choose_eps(at: At, estimator: Estimator) -> float:
    """The largest ε of :data:`LADDER` at which coefficients do not depend on ε.

    Args:
        at: losses at a point; scale 0 is θ itself.
        estimator: computes the coefficients.

    Raises:
        NonFiniteLossError: losses on the ladder are not finite.
    """
    here = at(0.0, DIRECTION).double()

    @functools.cache
    def coefficients(rung: int) -> Tensor:
        return _coefficients(at, estimator, LADDER[rung], here)

    @functools.cache
    def distance(rung: int) -> float:
        """Between a rung's coefficients and the next's."""
        return _distance(coefficients(rung), coefficients(rung + 1))

    steps = range(len(LADDER) - 1)
    best = FIRST_RUNG if distance(FIRST_RUNG) <= TOLERANCE else min(steps, key=distance)
    if not math.isfinite(distance(best)):
        if all(bool(coefficients(rung).isfinite().all()) for rung in range(len(LADDER))):
            return LADDER[-1]  # a loss that is constant up to rounding
        raise NonFiniteLossError(
            "the loss is not finite near the model's weights, so no eps can be chosen; look at the model and the first batch."
        )
    rung = best
    while rung in steps and distance(rung) <= max(TOLERANCE, 2 * distance(best)):
        rung += 1
    return LADDER[rung]


@tagged("activations")
def choose_reach(at: At) -> float:
    """The ε at which losses change by :data:`NATS`, root mean square over rows and a few directions; two digits.

    Args:
        at: mean negative log-probabilities of given tokens, a row each, at a point; scale 0 is θ itself.

    Raises:
        NonFiniteLossError: they are not finite at θ.
    """
    here = at(0.0, DIRECTION).double()
    if not bool(here.isfinite().all()):
        raise NonFiniteLossError("log-probabilities are not finite at the model's weights, so no eps can be chosen; look at the model.")

    def change(eps: float) -> float:
        moved = [at(sign * eps, DIRECTION + k).double() - here for k in range(LADDER_DIRECTIONS) for sign in (+1, -1)]
        found = float(torch.cat(moved).square().mean().sqrt())
        return found if math.isfinite(found) else math.inf

    low = before = 0.0
    for eps in REACHES:
        now = change(eps)
        if now >= NATS:
            break
        low, before = eps, now
    if not 0 < before < NATS <= now < math.inf:
        return eps
    share = math.log(NATS / before) / math.log(now / before)
    return float(f"{low * (eps / low) ** share:.2g}")


@tagged("activations")
def disagreement(at: At, estimator: Estimator, eps: float) -> float:
    """Relative distance of the coefficients at ε from those at 2ε: small where neither rounding nor curvature is in them.

    Args:
        at: losses at a point.
        estimator: computes the coefficients.
        eps: ε.
    """
    here = at(0.0, DIRECTION).double() if 0 in estimator.signs else None
    return _distance(*(_coefficients(at, estimator, scale, here) for scale in (eps, 2 * eps)))


def _coefficients(at: At, estimator: Estimator, eps: float, here: Tensor | None) -> Tensor:
    """Coefficients of the examples along the ladder's directions; ``here``: losses at θ, for an estimator that has them."""
    low, high = min(estimator.signs), max(estimator.signs)
    columns = []
    for k in range(LADDER_DIRECTIONS):
        plus, minus = (here if sign == 0 and here is not None else at(sign * eps, DIRECTION + k).double() for sign in (high, low))
        columns.append((plus - minus) / (eps * (high - low)))
    return torch.cat(columns)


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ over the root of ‖a‖ ‖b‖; infinite where that is undefined."""
    size = float((a.norm() * b.norm()).sqrt())
    distance = float((a - b).norm()) / size if size > 0 else math.inf
    return distance if math.isfinite(distance) else math.inf
