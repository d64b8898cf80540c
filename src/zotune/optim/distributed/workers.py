"""The workers of a run: the processes of a ``torch.distributed`` group that train one model together.

Each has the whole model, draws the same directions, and evaluates its share of a step's (direction, example) pairs. They exchange losses
only, in one all-gather per step: every worker then has the table of losses that one process would have, computes the same coefficients, and
applies the same update. No gradient or weight is sent, and the model is not wrapped. A digest of the batch goes with the losses, so that a
worker with other data is found before the update.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zotune.errors import LostWorkerError, RankMismatchError
from zotune.forward.batches import batch_tensors
from zotune.optim.distributed.partition import BATCHES, MODES, Block, blocks, pieces
from zotune.weights.digest import digest_of

#: Default number of steps between two comparisons of all workers' weights; a comparison reads every weight once.
CHECK_EVERY = 200
#: Bits of a batch's digest that go with the losses, in two numbers that float32 holds exactly.
DIGEST_BITS = 24


def batch_digest(batch: Any) -> str:
    """A digest of the tensors in a batch."""
    return digest_of({str(place): tensor for place, tensor in enumerate(batch_tensors(batch))})


def odd_ranks(values: Sequence[Any]) -> list[int]:
    """Ranks whose value differs from the majority's."""
    usual, _ = Counter(values).most_common(1)[0]
    return [rank for rank, value in enumerate(values) if value != usual]


def other_batch(odd: Sequence[int], step: int) -> RankMismatchError:
    """What is wrong where these ranks have another batch."""
    return RankMismatchError(
        f"ranks {', '.join(map(str, odd))} were given another batch than the other workers at step {step}: give every worker the same "
        "data, shuffled with the same seed, or say Workers(batches='own')."
    )


@dataclass(frozen=True)
class Share:
    """What this worker evaluates of a step, and what all do.

    Attributes:
        points: numbers of the points.
        pieces: (part, start, stop): columns of this worker's micro-batches.
        blocks: all workers'.
        shape: of the table of losses, (P, N).
    """

    points: range
    pieces: tuple[tuple[int, int, int], ...]
    blocks: tuple[Block, ...]
    shape: tuple[int, int]


class Workers:
    """The processes that take a run's steps together; one alone where ``torch.distributed`` is not initialized.

    Args:
        parallelism: ``"data"``: each evaluates every direction on its share of the examples; ``"directions"``: each evaluates its share
            of the directions on all examples, for losses in which examples depend on each other; ``"both"``; ``"auto"``: data as far as
            examples go, then directions.
        batches: ``"same"``: every worker passes ``step`` the same batch and evaluates its share of it; ``"own"``: every worker passes its
            own batch, and a step takes all of them, in the order of the ranks; ``"auto"``: determined at the first step.
        check_every: steps between two comparisons of all workers' weights; 0: at the first step only.
        group: the process group; None: the default one.

    Raises:
        ValueError: an unknown value, or directions split among workers whose batches differ.

    Example:
        >>> workers = Workers()
        >>> workers.size, workers.rank
        (1, 0)
    """

    def __init__(self, parallelism: str = "auto", batches: str = "auto", check_every: int = CHECK_EVERY, group: Any = None) -> None:
        for name, value, known in (("parallelism", parallelism, MODES), ("batches", batches, BATCHES)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}.")
        if check_every < 0:
            raise ValueError(f"check_every must be at least 0 steps, not {check_every}.")
        if batches == "own" and parallelism in ("directions", "both"):
            raise ValueError(f"parallelism={parallelism!r} needs workers with the same batch: set batches='same', or parallelism='data'.")
        self.parallelism, self.batches, self.check_every, self.group = parallelism, batches, check_every, group
        joined = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if joined else 1
        self.rank = dist.get_rank(group) if joined else 0
        self.first = self.rank == 0
        self.several = self.size > 1
        #: Whether this worker was asked to stop, and whether any was: sent with the losses, so that all know it after the same step.
        self.stop_requested = self.stopping = False
        #: Of the losses that are exchanged: float64 where a trained weight is.
        self.loss_dtype = torch.float32
        #: Bytes this worker has sent to each of the others.
        self.bytes_sent = 0
        self._step = 0
        self._parts: list[Any] | None = None
        self._digest: list[float] | None = None  # of the step's batch

    def begin_step(self, step: int, parts: list[Any] | None) -> None:
        """A step begins on these micro-batches, whose digest goes with its losses."""
        self._step, self._parts, self._digest = step, parts, None

    # -- the table of losses -------------------------------------------------------------------------------------------------------------

    def share(self, points: int, widths: Sequence[int], edges: Sequence[int] | None = None) -> Share:
        """What this worker evaluates of ``points`` points on micro-batches of so many columns.

        Args:
            edges: where columns are best cut; see :func:`~zotune.optim.distributed.partition.blocks`.
        """
        columns, begin = sum(widths), 0
        if not self.several or self.batches != "own":
            everybody = blocks(points, columns, self.size, self.parallelism, edges)
        else:
            ends = list(itertools.accumulate(int(count) for count in self.exchange(columns)))
            everybody = [Block(range(points), range(start, stop)) for start, stop in itertools.pairwise([0, *ends])]
            columns, begin = ends[-1], everybody[self.rank].columns.start
        mine = everybody[self.rank]
        here = range(mine.columns.start - begin, mine.columns.stop - begin) if len(mine.points) else range(0)
        return Share(mine.points, tuple(pieces(widths, here)), tuple(everybody), (points, columns))

    def gather(self, share: Share, values: Tensor | None, evaluated: int = 0, each: int = 1) -> tuple[Tensor, int]:
        """The whole table of losses, in :attr:`loss_dtype`, and the sequences evaluated for it, from all workers' blocks.

        Args:
            values: losses of the share, (points · each, columns); None where there is nothing to evaluate.
            evaluated: sequences that went through the model for them.
            each: rows of the table that a point has.

        Raises:
            RankMismatchError: some workers have another batch, where all should have the same.
        """
        if not self.several:
            assert values is not None, "a single worker evaluates everything"
            return values, evaluated
        sent = torch.zeros(max(map(len, share.blocks)) * each + 3, dtype=self.loss_dtype)
        if values is not None:
            sent[: values.numel()] = values.detach().to(self.loss_dtype).cpu().reshape(-1)
        sent[-3:-1] = torch.tensor(self._digest_to_send(), dtype=self.loss_dtype)
        sent[-1] = -1 - evaluated if self.stop_requested else evaluated
        found = self._all_gather(sent)
        odd = odd_ranks([tuple(row) for row in found[:, -3:-1].tolist()])
        if odd:
            raise other_batch(odd, self._step)
        table = torch.empty(share.shape[0] * each, share.shape[1], dtype=self.loss_dtype)
        for block, row in zip(share.blocks, found, strict=True):
            part = row[: len(block) * each].view(len(block.points) * each, len(block.columns))
            table[block.points.start * each : block.points.stop * each, block.columns.start : block.columns.stop] = part
        counts = found[:, -1].long()
        self.stopping = self.stopping or bool((counts < 0).any())
        return table, int(torch.where(counts < 0, -1 - counts, counts).sum())

    def _digest_to_send(self) -> list[float]:
        """Of the step's batch; zeros where workers may have different ones."""
        if self._parts is None or self.batches != "same":
            return [0.0, 0.0]
        if self._digest is None:
            bits = int(batch_digest(self._parts), 16)
            self._digest = [float(bits >> shift & 2**DIGEST_BITS - 1) for shift in (0, DIGEST_BITS)]
        return self._digest

    def sizes(self, sizes: Sequence[int]) -> tuple[list[int], int]:
        """Rows of all micro-batches of a step, and which of them is this worker's first."""
        if not self.several or self.batches != "own":
            return list(sizes), 0
        everybody = [list(map(int, found)) for found in self.exchange(list(sizes))]
        return list(itertools.chain(*everybody)), sum(map(len, everybody[: self.rank]))

    def chunk(self, rows: int) -> range:
        """Rows of a batch that this worker compares evaluations on: at least one, and all workers together all of them."""
        if not self.several or self.batches == "own":
            return range(rows)
        ways = min(self.size, rows)
        i = self.rank % ways
        return range(rows * i // ways, rows * (i + 1) // ways)

    # -- objects -------------------------------------------------------------------------------------------------------------------------

    def exchange(self, value: Any) -> list[Any]:
        """Every worker's value, by rank; any JSON value."""
        if not self.several:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._all_gather(torch.tensor([len(text)]))[:, 0].tolist()
        sent = torch.zeros(max(lengths), dtype=torch.uint8)
        sent[: len(text)] = text
        return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(self._all_gather(sent), lengths, strict=True)]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of the first worker, which alone calls ``make``; a JSON value.

        Raises:
            ValueError: on all workers, where the first raised a ValueError or an OSError; any other error is a LostWorkerError elsewhere.
        """
        if not self.several:
            return make()
        said: dict[str, Any] = {}
        error: Exception | None = None
        if self.first:
            try:
                said["value"] = make()
            except Exception as caught:
                error, said["error"], said["wrong"] = caught, str(caught), isinstance(caught, (ValueError, OSError))
        said = self._broadcast(said)
        if error is not None:
            raise error
        if "error" in said:
            raise (ValueError if said["wrong"] else LostWorkerError)(said["error"])
        return said.get("value")

    @contextmanager
    def on_first(self, held: AbstractContextManager[Any]) -> Iterator[None]:
        """A context that the first worker alone enters; its errors are raised on all workers, as by :meth:`from_first`."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(held)

            self.from_first(enter)
            yield

    def wait(self) -> None:
        """Wait for all workers."""
        self.exchange(None)

    # -- tensors -----------------------------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        """Where the group exchanges tensors: the CPU if it can, since losses end there; else the current accelerator."""
        served = dist.get_backend_config(self.group)  # "cpu:gloo,cuda:nccl"; get_backend() is "undefined" for a group begun without one
        devices = [pair.partition(":")[0] for pair in served.split(",")]
        return torch.device("cpu") if "cpu" in devices else torch.device(devices[0], torch.accelerator.current_device_index())

    def _all_gather(self, sent: Tensor) -> Tensor:
        """All workers' tensors of one shape, on the CPU, (workers, ...)."""
        sent = sent.to(self._device)
        found = [torch.empty_like(sent) for _ in range(self.size)]
        with _answered():
            dist.all_gather(found, sent, group=self.group)
        self.bytes_sent += sent.numel() * sent.element_size()
        return torch.stack(found).cpu()

    def _broadcast(self, value: Any) -> Any:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)
        length = torch.tensor([len(text)], device=self._device)
        with _answered():
            dist.broadcast(length, group=self.group, group_src=0)
            if not self.first:
                text = torch.empty(int(length), dtype=torch.uint8, device=self._device)
            dist.broadcast(text, group=self.group, group_src=0)
        return json.loads(text.cpu().numpy().tobytes())


@contextmanager
def _answered() -> Iterator[None]:
    """LostWorkerError for an exchange that fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostWorkerError(
            "another process of this run has ended or does not answer, and says why; start all processes again, and the run goes on from "
            "its journal."
        ) from error
