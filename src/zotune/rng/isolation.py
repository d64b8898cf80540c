"""Isolation of torch's global generators: a block gets its own random numbers, and the program around it is not affected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from zotune.io.execution import current
from zotune.rng.directions import Key, generator_seed


@contextmanager
def isolated_generators(key: Key, devices: Sequence[torch.device]) -> Iterator[None]:
    """Seed torch's global generators from ``key`` for the length of a block, and restore their states after it.

    A loss that draws random numbers gets the same ones at every evaluation of a step (common random numbers), new ones each step, and the
    same ones after a resume.

    Args:
        key: determines the seed.
        devices: generators of the CUDA devices among them are isolated too.
    """
    if not current().isolates_generators:
        yield
        return
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[d.index or 0] for d in devices if d.type == "cuda"]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(generator_seed(key))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
