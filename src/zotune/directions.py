"""Keyed random directions: every number is a pure function of (run seed, step, direction, parameter, element).

A zeroth-order step needs the direction Z three times (at +, at -, and in the update) and keeps it at none of them. So Z is never
stored: it is drawn again from its key, a block at a time, straight into the tensor that consumes it. Each block of a parameter has its
own generator, seeded from a cryptographic hash of the key, so blocks can be drawn in any order, by any thread, on any rank, after any
resume. torch's global generators are neither read nor advanced.

Numbers are equal bit for bit on the same device type; CPU and CUDA draw different (equally distributed) numbers.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

#: Elements to a block. 128 KiB of float32 stay in a core's cache between the draw and the axpy that consumes it, and torch runs an
#: elementwise kernel of this size on the calling thread, which leaves the parallelism to the block loop below.
CPU_BLOCK = 1 << 15
#: An accelerator wants few, large launches.
ACCELERATOR_BLOCK = 1 << 24
#: Most directions of one parameter that are drawn together, and the most numbers a parameter may have for that.
GROUP = 16
GROUPED_NUMEL = 1 << 13


class Key(NamedTuple):
    """What determines a random tensor: (run seed, step, direction index k, parameter name, what the numbers are for)."""

    seed: int
    step: int
    direction: int
    name: str
    purpose: str = "direction"


def generator_seed(key: Key, block: int = 0) -> int:
    """A 63-bit seed, BLAKE2b of the key and block. (torch's CPU generator uses 32 bits of it, its CUDA generator all.)"""
    text = f"{key.seed}|{key.step}|{key.direction}|{block}|{key.purpose}|{key.name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


_local = threading.local()


def _generator(key: Key, block: int, device: torch.device) -> torch.Generator:
    generators: dict[torch.device, torch.Generator] | None = getattr(_local, "generators", None)
    if generators is None:
        generators = _local.generators = {}
    generator = generators.get(device)
    if generator is None:
        generator = generators[device] = torch.Generator(device)
    return generator.manual_seed(generator_seed(key, block))


def block_size(device: torch.device) -> int:
    return CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="zotune-directions")


def for_blocks(numel: int, device: torch.device, work: Callable[[int, slice], None]) -> None:
    """Call ``work(block index, slice)`` for every block of a flat tensor; on CPU the blocks are shared out over torch's threads.

    The result cannot depend on the number of threads: every block draws from its own key and writes its own slice.
    """
    size = block_size(device)
    count = -(-numel // size)
    threads = min(torch.get_num_threads(), count // 4) if device.type == "cpu" else 1
    if threads <= 1:
        for block in range(count):
            work(block, slice(block * size, min(numel, (block + 1) * size)))
        return

    @torch.no_grad()  # grad mode belongs to a thread
    def share(first: int) -> None:
        for block in range(first, count, threads):
            work(block, slice(block * size, min(numel, (block + 1) * size)))

    list(_pool(threads).map(share, range(threads)))


def group_of(direction: int, numel: int) -> tuple[int, int]:
    """(first, count): the directions of a parameter of ``numel`` numbers that are drawn by one call of one generator.

    Seeding a generator and calling it costs as much as thousands of numbers, so the directions of small parameters come in groups
    {0}, {1, 2, 3}, {4..15}, {16..31}, {32..47}, ...: few calls and few numbers drawn in vain whatever K is, and direction k does not
    depend on K.
    """
    if numel > GROUPED_NUMEL or direction == 0:
        return direction, 1
    if direction >= GROUP:
        return direction - direction % GROUP, GROUP
    return (1, 3) if direction < 4 else (4, 12)


# -- distributions ------------------------------------------------------------------------------------------------------------------


def _gaussian(key: Key, block: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.empty(shape, device=device).normal_(generator=_generator(key, block, device))


def _rademacher(key: Key, block: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    words = torch.empty(shape[0], -(-shape[1] // 32), dtype=torch.int64, device=device)
    words.random_(0, 1 << 32, generator=_generator(key, block, device))  # 32 random bits each, every one a sign
    bits = (words.unsqueeze(2) >> torch.arange(32, device=device)) & 1
    return bits.flatten(1)[:, : shape[1]].float().mul_(2).sub_(1)


class Directions:
    """A distribution of directions Z with E[Z] = 0 and E[Z Zᵀ] = I, drawn from keys.

    - ``gaussian``: Z ~ N(0, I) (2305.17333);
    - ``rademacher``: independent signs ±1 (2506.09034);
    - ``sphere``: uniform on the sphere of radius √d of each parameter. With ‖Z‖² = d exactly over the whole model this has the second
      moment of the sphere of radius √d, and, unlike it, needs no pass over all parameters before the first number is known.

    Args:
        kind: one of the names above.

    Raises:
        ValueError: the name is none of them.

    Example:
        >>> key = Key(seed=0, step=3, direction=0, name="head.weight")
        >>> bool((Directions("gaussian").draw(key, (4, 2)) == Directions("gaussian").draw(key, (4, 2))).all())
        True
    """

    KINDS = ("gaussian", "rademacher", "sphere")

    def __init__(self, kind: str = "gaussian") -> None:
        if kind not in self.KINDS:
            near = difflib.get_close_matches(kind, self.KINDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(self.KINDS)}."
            raise ValueError(f"unknown direction distribution {kind!r}{hint}")
        self.kind = kind
        self._block = _rademacher if kind == "rademacher" else _gaussian

    def __repr__(self) -> str:
        return f"Directions({self.kind!r})"

    def block(self, key: Key, index: int, size: int, device: torch.device) -> Tensor:
        """Block ``index`` of the direction, float32, shape (size,); for the sphere still without its :meth:`scale`."""
        first, count = group_of(key.direction, size) if index == 0 else (key.direction, 1)
        return self._block(key._replace(direction=first), index, (count, size), device)[key.direction - first]

    def scale(self, key: Key, numel: int, device: torch.device) -> float:
        """What a block is to be multiplied by: 1, or √d / ‖z‖ for the sphere (which takes one pass over the numbers)."""
        if self.kind != "sphere":
            return 1.0
        size = block_size(device)
        squares = [0.0] * -(-numel // size)

        def add_up(index: int, part: slice) -> None:
            squares[index] = float(self.block(key, index, part.stop - part.start, device).square_().sum(dtype=torch.float64))

        for_blocks(numel, device, add_up)
        return math.sqrt(numel / sum(squares))

    def draw(self, key: Key, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        """The whole direction of one parameter, float32, of the given shape."""
        device = torch.device(device)
        numel = math.prod(shape)
        scale = self.scale(key, numel, device)
        if numel <= block_size(device):
            flat = self.block(key, 0, numel, device)
            return (flat if scale == 1.0 else flat.mul_(scale)).view(shape)
        return self.combine([(key, 1.0)], shape, device)

    def draw_many(self, key: Key, count: int, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        """Directions ``key.direction`` to ``key.direction + count - 1`` of one parameter, float32, shape (count, *shape)."""
        device, numel = torch.device(device), math.prod(shape)
        begin, end = key.direction, key.direction + count
        out = torch.empty(count, numel, device=device)
        small = numel <= block_size(device)
        direction = begin
        while direction < end:
            first, size = group_of(direction, numel)
            stop = min(end, first + size)
            rows = out if stop - direction == count else out[direction - begin : stop - begin]
            group = Key(key.seed, key.step, first, key.name, key.purpose)
            if not small:
                self._fill(group, rows[0])
            elif stop - direction < size:
                rows.copy_(self._block(group, 0, (size, numel), device)[direction - first : stop - first])
            elif self._block is _gaussian:  # straight into place: this is what a step does most often
                rows.normal_(generator=_generator(group, 0, device))
            else:
                rows.copy_(self._block(group, 0, (size, numel), device))
            direction = stop
        if self.kind == "sphere":
            for row in range(count):
                out[row] *= self.scale(key._replace(direction=begin + row), numel, device)
        return out.view(count, *shape)

    def _fill(self, key: Key, flat: Tensor) -> None:
        """Write a large direction, still without its scale, into ``flat``."""

        def write(index: int, part: slice) -> None:
            flat[part] = self.block(key, index, part.stop - part.start, flat.device)

        for_blocks(flat.numel(), flat.device, write)

    def combine(
        self,
        terms: Sequence[tuple[Key, float]],
        shape: tuple[int, ...] | torch.Size,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Σ weight · Z(key) over ``terms``, float32, of the given shape; no single Z is ever whole."""
        device = torch.device(device)
        numel = math.prod(shape)
        weights = [(key, weight * self.scale(key, numel, device)) for key, weight in terms]
        flat = torch.zeros(numel, device=device)

        def add(index: int, part: slice) -> None:
            for key, weight in weights:
                flat[part].add_(self.block(key, index, part.stop - part.start, device), alpha=weight)

        for_blocks(numel, device, add)
        return flat.view(shape)


def uniform_integers(key: Key, index: int, size: int, bits: int, device: torch.device) -> Tensor:
    """Block ``index`` of uniform integers in [0, 2^bits), int32, shape (size,): the dither of stochastic rounding."""
    out = torch.empty(size, dtype=torch.int32, device=device)
    return out.random_(0, 1 << bits, generator=_generator(key, index, device))
