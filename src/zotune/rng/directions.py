"""Keyed random directions: every element is a pure function of (run seed, step, direction, parameter, element).

A zeroth-order step uses the direction Z three times (at +, at −, and in the update). Z is not stored but generated from its key each time,
a block at a time, into the tensor that uses it. The bits come from ``counter``, the values from ``tables``: blocks may have any size and be
drawn in any order, by any thread, on any rank, after any resume, and rows of a matrix may be drawn alone. torch's global generators are
neither read nor advanced.

Only integer arithmetic, lookups and one rounded product (value × scale) are involved, so directions are equal bit for bit on every device;
a sphere's scale is a sum over a parameter, equal on devices of one type.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from zotune.io.caches import on_clear, tensor_cache
from zotune.io.execution import current
from zotune.io.memory_tags import memory_tag, tagged
from zotune.io.suggest import did_you_mean_or
from zotune.rng.counter import PAGE, Key, generator_seed, words, words_at, words_many, words_together
from zotune.rng.tables import scaled_pairs, scaled_signs
from zotune.rng.transfer import send, send_list

__all__ = ["GROUP", "GROUPED_NUMEL", "Directions", "Key", "block_size", "for_blocks", "generator_seed", "group_of", "uniform_integers"]

#: Elements of a block. One thread takes large blocks, which amortize the cost of a call. With several, torch runs an elementwise kernel of
#: at most 2¹⁵ elements on the calling thread, which leaves parallelism to the block loop below.
CPU_BLOCK = 1 << 18
SHARED_CPU_BLOCK = 1 << 15
#: An accelerator wants few, large launches; its scratch memory is ten bytes per element.
ACCELERATOR_BLOCK = 1 << 22
#: Directions of one parameter that are drawn together, at most, and the largest parameter for which they are.
GROUP = 16
GROUPED_NUMEL = 1 << 13


def block_size(device: torch.device) -> int:
    size = current().block_size
    if size is not None:
        return size
    if device.type != "cpu":
        return ACCELERATOR_BLOCK
    return CPU_BLOCK if torch.get_num_threads() == 1 else SHARED_CPU_BLOCK


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="zotune-directions")


def for_blocks(numel: int, device: torch.device, work: Callable[[slice], None], start: int = 0) -> None:
    """Call ``work(slice)`` for every block of elements ``start`` to ``numel - 1``, on a CPU with as many threads as torch has.

    Results do not depend on the number of threads.
    """
    size = block_size(device)
    if current().first_block_only:
        if numel > start:
            work(slice(start, min(numel, start + size)))
        return
    first, last = start // size, -(-numel // size)
    threads = min(torch.get_num_threads(), (last - first) // 4) if device.type == "cpu" else 1

    def block(index: int) -> slice:
        return slice(max(start, index * size), min(numel, (index + 1) * size))

    if threads <= 1:
        for index in range(first, last):
            work(block(index))
        return

    @torch.no_grad()  # grad mode belongs to a thread
    def share(thread: int) -> None:
        for index in range(first + thread, last, threads):
            work(block(index))

    list(_pool(threads).map(share, range(threads)))


def sum_of_blocks(block: Callable[[slice], Tensor], numel: int, device: torch.device) -> float:
    """The sum of what ``block`` makes of every block of elements, in an order that does not depend on the number of threads."""
    size = SHARED_CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK
    sums = [0.0] * -(-numel // size)

    def add_up(part: slice) -> None:
        found = block(part)
        for start in range(part.start, part.stop, size):
            sums[start // size] = float(found[start - part.start : start - part.start + size].sum(dtype=torch.float64))

    for_blocks(numel, device, add_up)
    return math.fsum(sums)


def group_of(direction: int, numel: int) -> tuple[int, int]:
    """(first, count): the directions of a parameter of ``numel`` elements that are drawn when ``direction`` is needed.

    The calls that draw one direction of a small parameter cost as much as thousands of elements, so its directions are drawn in groups
    {0}, {1, 2, 3}, {4..15}, {16..31}, {32..47}, ...: few calls and few unused elements for any K.
    """
    if numel > GROUPED_NUMEL or direction == 0:
        return direction, 1
    if direction >= GROUP:
        return direction - direction % GROUP, GROUP
    return (1, 3) if direction < 4 else (4, 12)


# -- distributions ------------------------------------------------------------------------------------------------------------------


class _Gaussian:
    """16 bits of a word select a pair of normals (``tables``)."""

    per_word = 8
    index_dtype = torch.uint16  # the bits of one lookup
    container = torch.int64  # a pair, copied by one lookup
    columns = 1

    @staticmethod
    def table(scale: float, device: torch.device) -> Tensor:
        return scaled_pairs(scale, device)


class _Rademacher:
    """A bit of a word is a sign; one lookup takes a byte."""

    per_word = 64
    index_dtype = torch.uint8
    container = torch.float32
    columns = 8

    @staticmethod
    def table(scale: float, device: torch.device) -> Tensor:
        return scaled_signs(scale, device)


_Source = type[_Gaussian] | type[_Rademacher]


def _expand(source: _Source, bits: Tensor) -> Tensor:
    """The elements of a few words (flat), float32, flat."""
    found = source.table(1.0, bits.device).index_select(0, bits.view(source.index_dtype).int())
    return found.view(torch.float32) if source.columns == 1 else found.view(-1)


@tensor_cache(maxsize=16)
def _front_index(numels: tuple[int, ...], per_word: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """``index`` and ``lengths`` of :func:`words_together` for parameters of these sizes, and which elements are used, None for all."""
    with torch.inference_mode(False):
        widths = [-(-numel // per_word) for numel in numels]
        index = torch.cat([torch.arange(width) for width in widths]).repeat(count)
        used = None
        if any(numel % per_word for numel in numels):
            starts = [start * per_word for start in itertools.accumulate(widths[:-1], initial=0)]
            used = torch.cat([torch.arange(start, start + numel) for start, numel in zip(starts, numels, strict=True)])
            used = send(used, device)
        return send(index, device), send_list(widths, device).repeat(count), used


class _Workspace:
    """Memory in which one thread generates one block, with the views of it that every call needs."""

    def __init__(self, source: _Source, words: Tensor, spare: Tensor, index: Tensor, numbers: Tensor) -> None:
        self.words, self.spare, self.index, self.numbers = words, spare, index, numbers
        self.index_bits = words.view(source.index_dtype)
        found = numbers.view(source.container)
        self.found = found if source.columns == 1 else found.view(-1, source.columns)

    @classmethod
    def of(cls, source: _Source, count: int, device: torch.device) -> _Workspace:
        with torch.inference_mode(False):  # writable in any mode later
            numbers = torch.empty(count * source.per_word, device=device)
            words, spare = numbers.view(torch.int64)[: 2 * count].chunk(2)  # both are read before the lookup writes
            index = torch.empty(words.view(source.index_dtype).numel(), dtype=torch.int32, device=device)
            return cls(source, words, spare, index, numbers)

    def part(self, source: _Source, count: int) -> _Workspace:
        """The front of this workspace, for ``count`` words."""
        index, numbers = self.index[: self.index.numel() // self.words.numel() * count], self.numbers[: count * source.per_word]
        return _Workspace(source, self.words[:count], self.spare[:count], index, numbers)


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.cached: dict[tuple[_Source, torch.device], _Workspace] = {}

    def get(self, source: _Source, count: int, device: torch.device) -> _Workspace:
        workspace = self.cached.get((source, device))
        whole = block_size(device) // source.per_word
        if workspace is None or workspace.words.numel() != whole:
            if count < whole // 4:  # too little work to cache it
                return _Workspace.of(source, count, device)
            workspace = self.cached[source, device] = _Workspace.of(source, whole, device)
        if count == whole:
            return workspace
        return workspace.part(source, count) if count < whole else _Workspace.of(source, count, device)


_workspaces = _Workspaces()
on_clear(lambda: _workspaces.cached.clear())


class Directions:
    """A distribution of directions Z with E[Z] = 0 and E[Z Zᵀ] = I, drawn from keys.

    - ``gaussian``: Z ~ N(0, I) (2305.17333), to the resolution of ``tables``;
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
    #: Whether kernels that generate every element may be used.
    dense = True

    def __init__(self, kind: str = "gaussian") -> None:
        if kind not in self.KINDS:
            raise ValueError(f"unknown direction distribution {kind!r}{did_you_mean_or(kind, self.KINDS, 'choose one of')}")
        self.kind = kind
        self.source = _Rademacher if kind == "rademacher" else _Gaussian

    def __repr__(self) -> str:
        return f"Directions({self.kind!r})"

    @tagged("directions")
    def block(self, key: Key, part: slice, device: torch.device, scale: float = 1.0) -> Tensor:
        """``scale`` times elements ``part`` of the direction, float32, flat; for the sphere still without its :meth:`scale`.

        The result is in memory that this thread's next call overwrites.
        """
        source = self.source
        first, lead = divmod(part.start, source.per_word)
        count = -(-part.stop // source.per_word) - first
        workspace = _workspaces.get(source, count, device)
        words(key, first, count, workspace.words, workspace.spare)
        workspace.index.copy_(workspace.index_bits)
        large = count * source.per_word >= SHARED_CPU_BLOCK  # the product is the same before the lookup and after it
        torch.index_select(source.table(scale if large else 1.0, device), 0, workspace.index, out=workspace.found)
        numbers = workspace.numbers if large or scale == 1.0 else workspace.numbers.mul_(scale)
        size = part.stop - part.start
        return numbers if size == numbers.numel() else numbers[lead : lead + size]

    @tagged("directions")
    def rows(self, key: Key, rows: Tensor, columns: int) -> Tensor:
        """Rows ``rows`` (int64, (R,)) of the direction of a matrix with so many columns: float32, (R, columns), without :meth:`scale`."""
        per_word = self.source.per_word
        count = -(-columns // per_word) + (1 if columns % per_word else 0)  # a row may begin inside a word
        first = rows * columns
        index = (first // per_word).unsqueeze(1) + torch.arange(count, device=rows.device)
        out = _expand(self.source, words_at(key, index).view(-1)).view(-1, count * per_word)
        if columns % per_word == 0:
            return out
        return out.gather(1, (first % per_word).unsqueeze(1) + torch.arange(columns, device=rows.device))

    @tagged("directions")
    def scale(self, key: Key, numel: int, device: torch.device) -> float:
        """The factor of a block: 1, or √d / ‖z‖ for the sphere (one pass over the elements)."""
        if self.kind != "sphere":
            return 1.0
        return math.sqrt(numel / sum_of_blocks(lambda part: self.block(key, part, device).square_(), numel, device))

    @tagged("directions")
    def draw(self, key: Key, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        """The whole direction of one parameter, float32, of the given shape."""
        device, numel = torch.device(device), math.prod(shape)
        flat = torch.empty(numel, device=device)
        scale = self.scale(key, numel, device)

        def write(part: slice) -> None:
            flat[part] = self.block(key, part, device, scale)

        for_blocks(numel, device, write)
        return flat.view(shape)

    @tagged("directions")
    def draw_many(self, key: Key, count: int, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        """Directions ``key.direction`` to ``key.direction + count - 1`` of one parameter, float32, shape (count, *shape)."""
        device, numel = torch.device(device), math.prod(shape)
        width = -(-numel // self.source.per_word)
        if width > PAGE:
            return torch.stack([self.draw(key._replace(direction=key.direction + row), shape, device) for row in range(count)])
        together = count if device.type != "cpu" else max(1, SHARED_CPU_BLOCK // (width * self.source.per_word))  # fits into a cache
        if together >= count:
            z = self._together(key, count, width, numel, device)
        else:
            z = torch.empty(count * numel, device=device)
            for row in range(0, count, together):
                rows = min(together, count - row)
                part = self._together(key._replace(direction=key.direction + row), rows, width, numel, device)
                z[row * numel : (row + rows) * numel] = part
        if self.kind == "sphere":
            for row, one in enumerate(z.view(count, numel)):
                one *= self.scale(key._replace(direction=key.direction + row), numel, device)
        return z.view(count, *shape)

    def _together(self, key: Key, count: int, width: int, numel: int, device: torch.device) -> Tensor:
        """A few directions of a small parameter, one after the other, flat, without :meth:`scale`."""
        z = _expand(self.source, words_many(key, count, width, device))
        if z.numel() == count * numel:
            return z
        return z[:numel] if count == 1 else z.view(count, -1)[:, :numel].reshape(-1)

    @tagged("directions")
    def draw_together(self, key: Key, count: int, names: Sequence[str], numels: Sequence[int], device: torch.device) -> Tensor:
        """:meth:`draw_many` for several small parameters, side by side: (count, sum of ``numels``).

        A call costs more than a small parameter's elements, so all parameters are drawn by one set of calls (except for the sphere, which
        has a scale per parameter).
        """
        if self.kind == "sphere":
            each = [self.draw_many(key._replace(name=name), count, (numel,), device) for name, numel in zip(names, numels, strict=True)]
            return torch.cat(each, dim=1)
        index, lengths, used = _front_index(tuple(numels), self.source.per_word, count, device)
        z = _expand(self.source, words_together(key.seed, key.step, names, key.direction, count, index, lengths, key.purpose))
        z = z.view(count, -1)
        return z if used is None else z.index_select(1, used)

    @tagged("directions")
    def combine(
        self,
        terms: Sequence[tuple[Key, float]],
        shape: tuple[int, ...] | torch.Size,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Σ weight · Z(key) over ``terms``, float32, of the given shape; no Z is materialized."""
        device, numel = torch.device(device), math.prod(shape)
        weights = [(key, weight * self.scale(key, numel, device)) for key, weight in terms]
        with memory_tag("gradients"):
            flat = torch.zeros(numel, device=device)
        for_blocks(numel, device, lambda part: self.add_to(flat[part], part, weights))
        return flat.view(shape)

    @tagged("directions")
    def add_to(self, target: Tensor, part: slice, moves: Sequence[tuple[Key, float]]) -> None:
        """target += Σ scale · Z(key)[part] over ``moves``; ``target`` is flat, and the scales include the sphere's."""
        for key, scale in moves:
            if len(moves) == 1:
                target.add_(self.block(key, part, target.device, scale))
            else:  # a table per scale would not fit in a cache; the products are the same
                target.add_(self.block(key, part, target.device).mul_(scale))


@tagged("directions")
def add_weighted(total: Tensor, z: Tensor, weights: Sequence[float]) -> Tensor:
    """total += Σ_k weights[k] · z[k], one direction after the other; products and sums are separate, so that rounding does not depend on
    an element's position or device."""
    for one, weight in zip(z, weights, strict=True):
        if weight:
            total.add_(one.to(total.dtype) * weight)
    return total


@tagged("directions")
def uniform_integers(key: Key, part: slice, bits: int, device: torch.device) -> Tensor:
    """Elements ``part`` of uniform integers in [0, 2^bits), bits ≤ 31, int32, flat: the dither of stochastic rounding."""
    first, lead = divmod(part.start, 2)
    count = -(-part.stop // 2) - first
    out, spare = torch.empty(2, count, dtype=torch.int64, device=device)
    drawn = words(key, first, count, out, spare)
    return drawn.view(torch.int32)[lead : lead + part.stop - part.start] & ((1 << bits) - 1)
