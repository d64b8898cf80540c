"""The stream: blocks come to where the model computes as a forward reaches them, and make room for the next.

Two rooms are enough: while the model computes with one, a thread fills the other with the block that came next the last time. What is
written to a weight that is away waits for its block (``residence``) and is done when that arrives, before anything is computed with it;
only blocks that were written go back. Who calls a model does not matter: hooks on the blocks are all there is.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zotune.weights import placement
from zotune.weights.offload import direct_io
from zotune.weights.offload.blocks import Moving, Part
from zotune.weights.offload.budget import Arrangement
from zotune.weights.offload.stores import Form, Store

#: A block whose waiting writes hold more than this fraction of its own bytes is brought in for them.
PATIENCE = 0.25


@dataclass
class _Block:
    number: int
    moving: list[Moving]
    waiting: list[Callable[[], object]] = field(default_factory=list)
    held: int = 0


@dataclass
class _Room:
    memory: Tensor
    block: _Block | None = None
    filled: Future[None] | None = None
    users: int = 0
    changed: bool = False
    used: int = 0  # when it was last asked for
    free: Any = None  # event on an accelerator: computing with what is in it is over


@dataclass
class Traffic:
    """What has passed so far."""

    blocks: int = 0
    bytes: int = 0
    written: int = 0
    waited: float = 0.0  # seconds in which nothing was computed for want of a block
    transfer: float = 0.0  # seconds in which the link was busy


class Stream:
    """Brings the blocks of a model in and out.

    Args:
        parts: the modules of each block.
        moving: the tensors of each.
        store: where they are kept; its layouts are in the same order.
        device: where the model computes.
        depth: rooms; one less than that many blocks are on their way at a time. At least 2.
        arrangement: how this was chosen under a cap, to be told.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        moving: Sequence[Sequence[Moving]],
        store: Store,
        device: torch.device,
        depth: int = 2,
        arrangement: Arrangement | None = None,
    ) -> None:
        assert depth >= 2
        self.arrangement = arrangement
        self.parts, self.store, self.device, self.depth = list(parts), store, device, depth
        self.traffic = Traffic()
        self._blocks = [_Block(number, list(some)) for number, some in enumerate(moving)]
        self._rooms: list[_Room] = []
        self._next = {number: (number + 1) % len(self._blocks) for number in range(len(self._blocks))}
        self._last: int | None = None
        self._asked = 0
        self.lock = threading.RLock()
        self._worker = ThreadPoolExecutor(1, "zotune-offload")
        self._saves: list[Future[None]] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.no_state = False
        self._handles: list[Any] = []
        for block, part in zip(self._blocks, self.parts, strict=True):
            for one in block.moving:
                placement.set_offload_handle(one.tensor, _BlockHandle(self, block))
                one.tensor.data = one.away
            self._hook(block, part)

    # -- in and out -----------------------------------------------------------------------------------------------------------------

    def _hook(self, block: _Block, part: Part) -> None:
        def before(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled() and any(t.requires_grad for t in [*module.parameters(), *args] if isinstance(t, Tensor)):
                raise ValueError(
                    "no backward pass goes through an offloaded model: train it with a zeroth-order method, or torch.no_grad()."
                )
            self.acquire(block)
            entered.append(True)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if entered:  # not, where something else failed before the block began
                entered.pop()
                self.release(block)

        entered: list[bool] = []
        for module in part.modules:
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        for one in block.moving:
            if one.owner is not None:
                self._handles.append(one.owner.register_state_dict_post_hook(_Saved(self, one)))
        for module in part.modules:
            self._handles += _loading_hooks(self, block, module)

    def acquire(self, block: _Block) -> None:
        """The tensors of a block hold their values until :meth:`release`."""
        with self.lock:
            self._check_saves()
            room = self._room_of(block)
            if room is None:
                room = self._vacant()
                self._fill(room, block)
            room.users += 1
            if self._last is not None:
                self._next[self._last] = block.number
            self._last = block.number
            self._asked += 1
            room.used = self._asked
            self._look_ahead(block)
            assert room.filled is not None
            begin = time.perf_counter()
            try:
                room.filled.result()
            except BaseException:
                room.users, room.block, room.filled = 0, None, None
                raise
            self.traffic.waited += time.perf_counter() - begin
            if room.users == 1:
                for one, view in zip(block.moving, self.store.layouts[block.number].views(room.memory), strict=True):
                    one.tensor.data = view
            try:
                while block.waiting:
                    room.changed = True
                    block.waiting.pop(0)()
                block.held = 0
            except BaseException:
                self.release(block)
                raise

    def release(self, block: _Block) -> None:
        """One who has acquired the block needs it no longer."""
        with self.lock:
            room = self._room_of(block)
            assert room is not None and room.users > 0
            room.users -= 1
            if room.users:
                return
            for one in block.moving:
                one.tensor.data = one.away
            if self._side is not None:
                room.free = torch.cuda.Event()
                room.free.record(torch.cuda.current_stream(self.device))
            if room.changed:
                room.changed = False
                self.traffic.written += self.store.layouts[block.number].size
                self._saves.append(self._worker.submit(self._save, room, block.number))

    def changed(self, block: _Block) -> None:
        """Somebody has written a block that is here."""
        room = self._room_of(block)
        assert room is not None and room.users
        room.changed = True

    def write(self, block: _Block, work: Callable[[], object], held: int) -> None:
        """See :class:`zotune.weights.placement.OffloadHandle`."""
        with self.lock:
            room = self._room_of(block)
            if room is not None and room.users:
                room.changed = True
                work()
                return
            block.waiting.append(work)
            block.held += held
            if block.held > PATIENCE * self.store.layouts[block.number].size:
                self.acquire(block)
                self.release(block)

    def flush(self) -> None:
        """Do everything that is waiting, and wait until it is kept."""
        for block in self._blocks:
            if block.waiting:
                self.acquire(block)
                self.release(block)
        for save in self._saves:
            save.result()
        self._saves.clear()

    @contextmanager
    def empty_state_dicts(self) -> Iterator[None]:
        """For the length of a block state dicts hold nothing (no memory, no values) for what comes and goes."""
        self.no_state = True
        try:
            yield
        finally:
            self.no_state = False

    def measure(self) -> float:
        """Bytes a second at which blocks come in, from two of them."""
        with self.lock:
            before = self.traffic.bytes, self.traffic.transfer
            for block in (self._blocks[0], self._blocks[-1]):
                self.acquire(block)
                self.release(block)
            for room in self._rooms:
                if room.filled is not None:
                    room.filled.result()
        return (self.traffic.bytes - before[0]) / max(self.traffic.transfer - before[1], 1e-9)

    def describe(self) -> str:
        """What comes and goes, and how long a pass over the weights takes at least."""
        rate = self.measure()
        size = sum(self.store.size(number) for number in range(len(self.parts)))
        rooms = sum(room.memory.numel() for room in self._rooms)
        chosen = "" if self.arrangement is None else f"\n{self.arrangement.describe()}"
        return (
            f"offloaded: {len(self.parts)} blocks come and go through {rooms / 2**30:.2f} GiB, {size / 2**30:.2f} GiB a forward pass at "
            f"{rate / 1e9:.2f} GB/s: at least {size / rate:.2g} s each{chosen}"
        )

    def by_block(self, tensors: Mapping[str, Tensor]) -> list[list[str]]:
        """Names of those of the tensors that come and go, a list for each block."""
        found: list[list[str]] = [[] for _ in self._blocks]
        for name, tensor in tensors.items():
            home = placement.offload_handle(tensor)
            if isinstance(home, _BlockHandle) and home.stream is self:
                found[home.block.number].append(name)
        return found

    def bring_back(self) -> None:
        """End the stream: every tensor that a block still has stays from now on, in memory of its own. The model is a plain one then."""
        self.flush()
        for block, part in zip(self._blocks, self.parts, strict=True):
            wanted = {id(t) for m in part.modules for t in [*m.parameters(), *m.buffers()]}
            here = [one for one in block.moving if id(one.tensor) in wanted or one.owner is None]
            if here:
                self.acquire(block)
                values = [one.tensor.detach().clone() for one in here]
                self.release(block)
                for one, value in zip(here, values, strict=True):
                    one.tensor.data = value
            for one in block.moving:
                placement.clear_offload_handle(one.tensor)
        for handle in self._handles:
            handle.remove()
        self.close()

    def close(self) -> None:
        """Stop the threads and let go of files and memory."""
        self._worker.shutdown()
        self._rooms.clear()
        self.store.close()

    # -- rooms ----------------------------------------------------------------------------------------------------------------------

    def _room_of(self, block: _Block) -> _Room | None:
        return next((room for room in self._rooms if room.block is block), None)

    def _vacant(self) -> _Room:
        """A room that nobody computes with, the one used longest ago."""
        if not self._rooms:
            size = max(layout.size for layout in self.store.layouts)
            for _ in range(min(self.depth, max(2, len(self._blocks)))):
                on_device = torch.empty(direct_io.pages(size), dtype=torch.uint8, device=self.device) if self._side is not None else None
                self._rooms.append(_Room(direct_io.room(size) if on_device is None else on_device))
        free = [room for room in self._rooms if not room.users]
        assert free, "more blocks are in use at once than there are rooms"
        return min(free, key=lambda room: room.used)

    def _look_ahead(self, block: _Block) -> None:
        """Have the blocks that are likely to come next fetched into rooms that nobody uses."""
        number = block.number
        wanted = [block]
        for _ in range(len(self._rooms) - 1):
            number = self._next[number]
            following = self._blocks[number]
            if any(following is one for one in wanted):
                return
            wanted.append(following)
            if self._room_of(following) is None:
                free = [room for room in self._rooms if not room.users and not any(room.block is one for one in wanted)]
                if not free:
                    return
                self._fill(min(free, key=lambda room: room.used), following)

    def _fill(self, room: _Room, block: _Block) -> None:
        self._asked += 1
        room.block, room.used = block, self._asked
        room.filled = self._worker.submit(self._load, room, block.number)

    def _load(self, room: _Room, number: int) -> None:
        begin = time.perf_counter()
        with self._beside(room):
            self.store.load(number, room.memory)
        self.traffic.transfer += time.perf_counter() - begin
        self.traffic.blocks += 1
        self.traffic.bytes += self.store.size(number)

    def _save(self, room: _Room, number: int) -> None:
        with self._beside(room):
            self.store.save(number, room.memory)

    @contextmanager
    def _beside(self, room: _Room) -> Iterator[None]:
        """In the worker's thread: copies on a stream of their own, after what was computed with the room, complete at the end."""
        with torch.no_grad():
            if self._side is None:
                yield
                return
            with torch.cuda.stream(self._side):
                if room.free is not None:
                    self._side.wait_event(room.free)
                yield
                self._side.synchronize()

    def _check_saves(self) -> None:
        while self._saves and self._saves[0].done():
            self._saves.pop(0).result()

    def attach(self, block: _Block, tensor: Tensor) -> None:
        """See :class:`zotune.weights.placement.OffloadHandle`."""
        with self.lock:
            self.flush()
            assert not any(room.users for room in self._rooms)
            for room in self._rooms:
                if room.filled is not None:
                    room.filled.result()
            self._rooms.clear()
            one = Moving.of(f"beside {block.moving[0].name} {len(block.moving)}", None, "", tensor, self.device)
            self.store.layouts[block.number].add(Form(one.name, tensor.dtype, tuple(tensor.shape)))
            block.moving.append(one)
            placement.set_offload_handle(tensor, _BlockHandle(self, block))
            tensor.data = one.away


class _BlockHandle:
    """The home of the tensors of one block."""

    def __init__(self, stream: Stream, block: _Block) -> None:
        self.stream, self.block = stream, block

    @property
    def lossy(self) -> bool:
        return self.stream.store.lossy

    @contextmanager
    def loaded(self) -> Iterator[None]:
        with self.stream.lock:
            self.stream.acquire(self.block)
            try:
                yield
            finally:
                self.stream.release(self.block)

    def write(self, work: Callable[[], object], held: int) -> None:
        self.stream.write(self.block, work, held)

    def attach(self, tensor: Tensor) -> None:
        self.stream.attach(self.block, tensor)


class _Saved:
    """State-dict hook: what a state dict holds of a tensor are its values. (A class, because torch sets an attribute on the hook.)"""

    def __init__(self, stream: Stream, one: Moving) -> None:
        self.stream, self.local, self.tensor = stream, one.local, weakref.ref(one.tensor)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        tensor = self.tensor()
        there = tensor is not None and module._parameters.get(self.local, module._buffers.get(self.local)) is tensor
        if there and prefix + self.local in state_dict and not self.stream.no_state:
            assert tensor is not None
            state_dict[prefix + self.local] = placement.snapshot(tensor)


def _loading_hooks(stream: Stream, block: _Block, module: nn.Module) -> list[Any]:
    """What brings a block in while a state dict is loaded into it."""
    held: list[bool] = []

    def before(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            stream.acquire(block)
            held.append(True)

    def after(module: nn.Module, incompatible: Any) -> None:
        if held:
            held.pop()
            stream.changed(block)
            stream.release(block)

    return [module.register_load_state_dict_pre_hook(before), module.register_load_state_dict_post_hook(after)]


def stream_of(model: nn.Module) -> Stream | None:
    """The stream of an offloaded model; None of another."""
    for tensor in [*model.parameters(), *model.buffers()]:
        found = placement.offload_handle(tensor)
        if isinstance(found, _BlockHandle):
            return found.stream
    return None
