"""CUDA graphs of batched evaluations, captured once and replayed: a forward without the host's launches.

A forward of a transformer takes hundreds of kernel launches, and a small batch leaves the device waiting for them. A captured graph is
one launch. The batch and the directions of a step are copied to the addresses that the graph reads; weights, low-rank factors and norms are
read in place.

A graph repeats the work of the device, not that of Python. So only loss functions with ``capturable = True`` are captured (tensors in,
tensors out, no synchronization, no state), and only without offloaded weights. A loss that draws random numbers or synchronizes is
evaluated directly. Whether a batch is captured depends on its shape alone, and every evaluation of it is then a replay, including the
first, so that a resumed run gets the same losses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward.batch_context import BatchContext
from zotune.forward.batches import BatchLayout, batch_rows, batch_tensors, take_rows
from zotune.forward.model import PerturbedForward
from zotune.subspaces import FullCoordinate, LowRankCoordinate

CHOICES = ("auto", True, False)
#: Floating-point operations of a forward from which launching it takes less time than the device's work.
BUSY = 1e14
#: Graphs kept, one per shape of batch.
MAX_GRAPHS = 32


class CapturedForward:
    """The graph of one evaluation, with the tensors it reads the batch and directions from and writes the losses to."""

    def __init__(
        self,
        forward: PerturbedForward,
        loss_fn: Callable[..., Any],
        function: Callable[[Any], Tensor],
        rows: Any,
        layout: BatchLayout,
        pool: Any,
    ) -> None:
        self.loss_fn = loss_fn  # graphs are found by its id, so it has to stay alive
        count = batch_rows(rows)
        self.rows = take_rows(rows, torch.arange(count), count)  # a copy
        self.context = BatchContext(layout, forward.directions, forward.siblings, persistent=True)
        states = _generator_states(forward.devices)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # warm-up: compilation and caches are not captured
            forward.evaluate_in(lambda: function(self.rows), self.context)
        current.wait_stream(side)
        if any(not torch.equal(a, b) for a, b in zip(states, _generator_states(forward.devices), strict=True)):
            raise NotBatchableError("the loss draws random numbers")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.losses = forward.evaluate_in(lambda: function(self.rows), self.context)

    def replay(self, rows: Any, layout: BatchLayout) -> Tensor:
        for captured, new in zip(batch_tensors(self.rows), batch_tensors(rows), strict=True):
            captured.copy_(new)
        self.context.advance(layout)
        self.graph.replay()
        return self.losses.clone()


class CudaGraphs:
    """The captured forwards of a run.

    Args:
        forward: evaluates the model.
        choice: True: every loss function; ``"auto"``: those with ``capturable``, and small batches; False: none.

    Attributes:
        enabled: whether evaluations are captured, as far as is known.
        captured: graphs captured so far.

    Raises:
        ValueError: another choice.
    """

    def __init__(self, forward: PerturbedForward, choice: bool | str) -> None:
        if choice not in CHOICES:
            raise ValueError(f"cuda_graphs must be True, False or 'auto', not {choice!r}.")
        self.forward, self.choice = forward, choice
        possible = [device.type for device in forward.devices] == ["cuda"] and not forward.sharded and not forward.streams
        self.enabled = bool(choice) and possible and _is_capturable(forward)
        self.captured = 0
        self._parameters = [*forward.model.parameters(), *forward.model.buffers()]
        self._low_rank = [c for c in forward.coordinates if isinstance(c, LowRankCoordinate)]
        self._numel = sum(parameter.numel() for parameter in forward.model.parameters())
        self._graphs: OrderedDict[Any, CapturedForward] = OrderedDict()
        self._addresses: list[int] = []
        self._pool: Any = None

    def losses(self, loss_fn: Callable[..., Any], function: Callable[[Any], Tensor], rows: Any, layout: BatchLayout) -> Tensor | None:
        """The losses of the rows of a layout, ``function(rows)`` of ``loss_fn``; None where they are not captured."""
        if not self.enabled or not self.captures(loss_fn, rows):
            return None
        addresses = [tensor.data_ptr() for tensor in self._parameters] + [c.v.data_ptr() for c in self._low_rank]
        if addresses != self._addresses:
            self._clear()
            self._addresses = addresses
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in batch_tensors(rows))
        signature = id(loss_fn), shapes, layout.directions, layout.scales, layout.rows
        graph = self._graphs.get(signature)
        if graph is None:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                graph = self._graphs[signature] = CapturedForward(self.forward, loss_fn, function, rows, layout, self._pool)
            except Exception:  # an error that is not due to the capture is raised again by the direct evaluation
                self.enabled = False
                self._clear()
                for device in self.forward.devices:  # an aborted capture leaves the generator in capture mode
                    generator = torch.cuda.default_generators[device.index or 0]
                    generator.graphsafe_set_state(generator.clone_state())
                return None
            self.captured += 1
        self._graphs.move_to_end(signature)
        return graph.replay(rows, layout)

    def captures(self, loss_fn: Callable[..., Any], rows: Any) -> bool:
        """Whether losses of such rows are captured, where graphs are enabled."""
        if not (self.choice is True or getattr(loss_fn, "capturable", False)) or not _is_tensors_only(rows):
            return False
        tokens = max((tensor.numel() for tensor in batch_tensors(rows)), default=0)
        return self.choice is True or 2.0 * self._numel * tokens < BUSY

    def _clear(self) -> None:
        self._graphs.clear()
        self._pool = None  # freed with its last graph


def _is_capturable(forward: PerturbedForward) -> bool:
    """Whether a step's perturbation depends on directions and keys only, which can be copied into a graph's inputs."""
    known = all(type(c) in (FullCoordinate, LowRankCoordinate) and c.schedule is None for c in forward.coordinates)
    return known and (forward.dense is None or (forward.directions.dense and forward.directions.kind != "sphere"))


def _generator_states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _is_tensors_only(batch: Any) -> bool:
    """Whether a batch holds nothing but tensors of rows."""
    if isinstance(batch, Tensor):
        return batch.dim() > 0
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return isinstance(batch, (Mapping, tuple, list)) and all(_is_tensors_only(part) for part in parts)
