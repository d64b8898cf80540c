"""Batched evaluations recorded once as a CUDA graph and replayed: a forward without the host's work of launching it.

A forward of a transformer is some hundred launches, and what is evaluated low_rank_output it some hundred more. Where a batch is small the device
waits for them. Recorded, all of it is one call. What changes from step to step is brought in from outside: the batch and the directions
are copied to where the recording reads them; weights, low-rank factors and norms are read where they lie.

A recording repeats what the device did, not what Python did. So only loss functions that say so are recorded (``capturable = True``:
tensors in, tensors out, nothing read back, nothing remembered), and only where no weight comes and goes. One that draws random numbers, or
waits for the device, is evaluated as ever. Whether a batch is recorded depends on its shape alone, and every evaluation of it is then a
replay, the first as well, so that a run that is resumed sees the same losses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward import batches
from zotune.forward.batch_context import BatchContext
from zotune.forward.batches import BatchLayout
from zotune.forward.model import PerturbedForward
from zotune.subspaces import FullCoordinate, LowRankCoordinate

CHOICES = ("auto", True, False)
#: Floating-point operations of a forward above which launching it costs the device nothing: it is busy meanwhile.
BUSY = 1e14
#: Recordings kept, one a shape of batch.
KEPT = 32


class Recording:
    """One evaluation: where it reads its batch and directions, and where it leaves its losses."""

    def __init__(
        self, probe: PerturbedForward, loss_fn: Callable[..., Any], function: Callable[[Any], Tensor], rows: Any, stack: BatchLayout, pool: Any
    ) -> None:
        self.loss_fn = loss_fn  # by whose identity a recording is found
        self.rows = _twin(rows)
        self.context = BatchContext(stack, probe.directions, probe.siblings, hold=True)
        states = _states(probe.devices)
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # what is compiled, or made once, is not to be recorded
            probe.evaluate_in(lambda: function(self.rows), self.context)
        current.wait_stream(aside)
        if any(not torch.equal(a, b) for a, b in zip(states, _states(probe.devices), strict=True)):
            raise NotBatchableError("the loss draws random numbers")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.losses = probe.evaluate_in(lambda: function(self.rows), self.context)

    def replay(self, rows: Any, stack: BatchLayout) -> Tensor:
        for held, new in zip(batches.batch_tensors(self.rows), batches.batch_tensors(rows), strict=True):
            held.copy_(new)
        self.context.renew(stack)
        self.graph.replay()
        return self.losses.clone()


class CudaGraphs:
    """The recordings of a run.

    Args:
        probe: evaluates the model.
        choice: True: every loss function; ``"auto"``: those that say ``capturable``, and small batches; False: none.
    """

    def __init__(self, probe: PerturbedForward, choice: bool | str) -> None:
        if choice not in CHOICES:
            raise ValueError(f"cuda_graphs must be True, False or 'auto', not {choice!r}.")
        self.probe, self.choice = probe, choice
        possible = [device.type for device in probe.devices] == ["cuda"] and not probe.sharded and not probe.streams
        #: Whether evaluations are recorded, as far as is known.
        self.enabled = bool(choice) and possible and _recordable(probe)
        self._stay = [*probe.model.parameters(), *probe.model.buffers()]
        self._low_rank = [c for c in probe.coordinates if isinstance(c, LowRankCoordinate)]
        self._weights = sum(parameter.numel() for parameter in probe.model.parameters())
        self._kept: OrderedDict[Any, Recording] = OrderedDict()
        self.captured = 0
        self._places: list[int] = []
        self._pool: Any = None

    def losses(self, loss_fn: Callable[..., Any], function: Callable[[Any], Tensor], rows: Any, stack: BatchLayout) -> Tensor | None:
        """The losses of stacked rows, ``function(rows)`` of ``loss_fn``; None where they are not recorded."""
        if not self.enabled or not self._takes(loss_fn, rows):
            return None
        places = [tensor.data_ptr() for tensor in self._stay] + [c.v.data_ptr() for c in self._low_rank]
        if places != self._places:
            self._forget()
            self._places = places
        signature = id(loss_fn), _shape(rows), stack.directions, stack.scales, stack.rows
        recording = self._kept.get(signature)
        if recording is None:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                recording = self._kept[signature] = Recording(self.probe, loss_fn, function, rows, stack, self._pool)
            except Exception:  # whatever a model does that cannot be recorded, it does again, where it is seen
                self.enabled = False
                self._forget()
                for device in self.probe.devices:  # one that breaks off leaves the generator as if it were being recorded
                    generator = torch.cuda.default_generators[device.index or 0]
                    generator.graphsafe_set_state(generator.clone_state())
                return None
            self.captured += 1
        self._kept.move_to_end(signature)
        return recording.replay(rows, stack)

    def _forget(self) -> None:
        self._kept.clear()
        self._pool = None  # which goes with the last recording in it

    def _takes(self, loss_fn: Callable[..., Any], rows: Any) -> bool:
        if not (self.choice is True or getattr(loss_fn, "capturable", False)) or not _of_tensors(rows):
            return False
        tokens = max((tensor.numel() for tensor in batches.batch_tensors(rows)), default=0)
        return self.choice is True or 2.0 * self._weights * tokens < BUSY


def _recordable(probe: PerturbedForward) -> bool:
    """Whether what moves is told of a step by directions and keys alone, which can be brought in from outside."""
    known = all(type(c) in (FullCoordinate, LowRankCoordinate) and c.schedule is None for c in probe.coordinates)
    return known and (probe.dense is None or (probe.directions.dense and probe.directions.kind != "sphere"))


def _states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _of_tensors(batch: Any) -> bool:
    """Whether there is nothing else in a batch than tensors of rows."""
    if isinstance(batch, Tensor):
        return batch.dim() > 0
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return isinstance(batch, (Mapping, tuple, list)) and all(_of_tensors(part) for part in parts)


def _twin(batch: Any) -> Any:
    """A batch of the same things with tensors of its own."""
    rows = batches.batch_rows(batch)
    return batches.take_rows(batch, torch.arange(rows), rows)


def _shape(batch: Any) -> tuple[Any, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in batches.batch_tensors(batch))
