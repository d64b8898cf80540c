"""Differentially private steps: every example's coefficients are clipped, and their sum gets Gaussian noise.

This is DP-ZO (2401.04343), and DPZero (2310.09639) with Gaussian directions.
With c_ik the coefficient of example i along direction k, as the estimator makes it of the example's own losses, a step draws each of the n
examples with probability q = B/n and releases, for K directions,

    c_k = (1/B) (Σ_i clip(c_ik, −C, C) + 1.02 σ √K C ξ_k),    ξ ~ N(0, 1)

and nothing else: what follows is a function of the c_k and of the seed. One example changes the vector of K sums by at most √K C in length
(replaced by another: 2 √K C), and by 2 % more through the rounding of the others' losses (:data:`SLACK`), so the noise multiplier of the
Gaussian mechanism is σ.

Noise and samples come from a secret key (:mod:`zotune.rng.secret`), not from the run's seed, which is published. They also depend on all
that has been released before them, so that runs with one key that diverge share neither noise nor samples from there on. Clipped
coefficients and noise are whole multiples of C / 2²⁴ and are summed as integers: which sums are possible does not depend on the data, where
sums of floating-point numbers would tell of them by their last bits (Mironov 2012).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.methods.estimators import Estimate
from zotune.optim import accounting
from zotune.optim.journal_records import StepRecord, pack
from zotune.rng.secret import SecretStream, new_key

#: Multiples of this part of C are summed.
PARTS = 1 << 24
#: How much more than by its own coefficient an example may change the sum: rounding of the other examples' losses, which are computed in
#: the same products. Part of C.
SLACK = 0.02


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What a private run is promised, and the key that keeps the promise.

    Args:
        clip: C, the largest coefficient of an example; noise and signal both grow with it.
        noise_multiplier: σ, the noise's standard deviation over the largest change that one example can make; see :meth:`for_epsilon`.
        examples: n, the size of the data set; public.
        batch_size: B, the mean number of examples of a step.
        public_batch: a batch for the loss function, of examples that are not private (made up, for example) in the form of the private
            ones: checks of the model are made with it.
        delta: δ.
        neighbors: which data sets are hard to tell apart: those that differ in whether an example takes part (``"add-or-remove"``), or in
            an example that is exchanged for any other (``"replace-one"``, the stronger one).
        key: secret, and for one run alone: who knows it can remove the noise. By default a new one of the operating system.

    Raises:
        ValueError: a value is out of range.
    """

    clip: float
    noise_multiplier: float
    examples: int
    batch_size: int
    public_batch: Any = field(repr=False)
    delta: float = 1e-5
    neighbors: str = "add-or-remove"
    key: bytes = field(default_factory=new_key, repr=False)

    #: Of a run's journal.
    PUBLIC: ClassVar[tuple[str, ...]] = ("clip", "noise_multiplier", "examples", "batch_size", "delta", "neighbors")

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}.")
        check_neighbors(self.neighbors)
        if not 1 <= self.batch_size <= self.examples:
            raise ValueError(
                f"a step of {self.batch_size} examples on average cannot be drawn from {self.examples}: batch_size must be at least 1, and "
                "at most the number of examples."
            )
        check_delta(self.delta, self.examples)
        SecretStream(self.key)

    @classmethod
    def for_epsilon(cls, epsilon: float, steps: int, **options: Any) -> Privacy:
        """With the least noise that lets ``steps`` steps spend at most ``epsilon``.

        Args:
            epsilon: ε.
            steps: how many there will be.
            options: the other arguments of :class:`Privacy`.

        Raises:
            ValueError: no noise does.
            ModuleNotFoundError: ``dp-accounting`` is not installed.
        """
        delta, neighbors = options.get("delta", cls.delta), check_neighbors(options.get("neighbors", cls.neighbors))
        rate = options["batch_size"] / options["examples"]
        return cls(noise_multiplier=accounting.noise_for(epsilon, rate, steps, delta, neighbors), **options)

    @property
    def rate(self) -> float:
        """q, the probability of an example to be in a step."""
        return self.batch_size / self.examples

    def epsilon(self, steps: int) -> float:
        """ε that ``steps`` steps spend; ModuleNotFoundError where ``dp-accounting`` is not installed."""
        return accounting.epsilon(self.noise_multiplier, self.rate, steps, self.delta, self.neighbors)

    def public(self) -> dict[str, Any]:
        """The settings, without the key."""
        return {name: getattr(self, name) for name in self.PUBLIC}


def check_delta(delta: float, examples: int) -> None:
    """ValueError where δ is no probability, or lets an example be published."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta!r}.")
    if delta * examples >= 1:
        raise ValueError(
            f"delta={delta:g} is not below one over the number of examples, {examples}: publishing one of them at random would satisfy "
            "it. Give a smaller delta."
        )


def check_neighbors(neighbors: str) -> str:
    """ValueError where there is no such relation."""
    if neighbors not in accounting.NEIGHBORS:
        raise ValueError(f"unknown neighbors {neighbors!r}: choose one of {', '.join(accounting.NEIGHBORS)}.")
    return neighbors


def clipped_sums(singles: Tensor, clip: float) -> list[int]:
    """Σ_i of c_ik, clipped to ±``clip``, in parts of ``clip`` / 2²⁴, (K,); a coefficient that is not finite counts as 0.

    Args:
        singles: coefficients of single examples, (K, N), float64.
    """
    bounded = torch.nan_to_num(singles.double() / clip, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1.0, 1.0)
    return (bounded * PARTS).round().to(torch.int64).sum(dim=1).tolist()


class PrivateSteps:
    """Samples the examples of a run's steps and adds the noise.

    Attributes:
        released: digest of the run's settings and of all steps so far; None before the first.
        sample: the examples of the next step, once they have been drawn.
        checked: whether the loss has been checked on the public batch.
    """

    def __init__(self, privacy: Privacy) -> None:
        self.privacy, self.stream = privacy, SecretStream(privacy.key)
        self.released: bytes | None = None
        self.sample: list[int] | None = None
        self.checked = False

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin the digest with what determines the run before its first step."""
        self.released = hashlib.blake2b(json.dumps([settings, self.privacy.public()], sort_keys=True).encode(), digest_size=32).digest()

    def draw(self) -> list[int]:
        """The examples of the next step, each with probability q, by number."""
        if self.sample is None:
            assert self.released is not None
            uniforms = self.stream.uniforms("sample", self.released, self.privacy.examples)
            self.sample = (uniforms < self.privacy.rate).nonzero()[0].tolist()
        return self.sample

    def estimate(self, singles: Tensor | None, directions: int) -> Estimate:
        """What a step releases.

        Args:
            singles: coefficients of the sampled examples, (K, N); None: there are none.
            directions: K.
        """
        assert self.released is not None
        privacy = self.privacy
        sums = [0] * directions if singles is None else clipped_sums(singles, privacy.clip)
        spread = (1 + SLACK) * privacy.noise_multiplier * math.sqrt(directions) * PARTS
        noise = [round(spread * normal) for normal in self.stream.normals("noise", self.released, directions)]
        unit = privacy.clip / PARTS / privacy.batch_size
        coefficients = torch.tensor([unit * (part + added) for part, added in zip(sums, noise, strict=True)], dtype=torch.float32)
        return Estimate(math.nan, coefficients, (False,) * directions, math.nan, None)

    def extend(self, record: StepRecord) -> None:
        """A step is taken: noise and sample of the next one depend on it."""
        assert self.released is not None
        self.released = hashlib.blake2b(self.released + pack(record), digest_size=32).digest()
        self.sample = None

    def state(self) -> dict[str, Any]:
        """The state between steps, without the key; JSON."""
        released = None if self.released is None else self.released.hex()
        return {"released": released, "key": self.stream.digest("key"), "settings": self.privacy.public()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a state.

        Raises:
            ValueError: it was saved with another key or other settings, or by a run without privacy.
        """
        if state is None:
            raise ValueError("the saved run was not private, so a private one cannot continue it: start a new run.")
        released, settings = state.get("released"), state.get("settings")
        if not (released is None or isinstance(released, str)) or not isinstance(settings, dict):
            raise ValueError("the saved state is damaged, its 'privacy' is none of such a run.")
        changed = [name for name, value in self.privacy.public().items() if settings.get(name) != value]
        if changed:
            raise ValueError(f"the saved run was private with another {', '.join(changed)}: continue with the run's own.")
        if state.get("key") != self.stream.digest("key"):
            raise ValueError("the key is not that of the saved run, whose noise and samples would be others: continue with the run's own.")
        self.released = None if released is None else bytes.fromhex(released)
        self.sample = None
