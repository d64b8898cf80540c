"""The ledger: every tensor that is alive while a step runs, its kind, and the peak of their sum.

Storages are counted when torch allocates and frees them, as torch's own ``MemTracker`` (``torch.distributed._tools``) does. The kinds of
zeroth-order training come from the code that allocates (:mod:`zotune.io.memory_tags`) and from hooks of the model's modules. The same
ledger serves real steps and dry runs.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zotune.baselines import FirstOrder
from zotune.io.memory_tags import pop, push, recording_tags, tags
from zotune.optim.optimizer import ZerothOrder
from zotune.weights.structure import output_embeddings

#: The kinds of memory, in the order of tables and charts.
KINDS = ("weights", "gradients", "optimizer state", "activations", "directions", "logits", "temporary")


@dataclass
class Piece:
    """A storage: its bytes, its kind, and the events that allocated and freed it (``died`` None: never)."""

    size: int
    kind: str
    born: int
    died: int | None = None


@dataclass(frozen=True)
class Split:
    """Bytes by kind at the peak, and the largest tensors then: (bytes, kind)."""

    kinds: dict[str, int]
    largest: tuple[tuple[int, str], ...] = ()

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


class UntaggedError(RuntimeError):
    """A step has allocated a tensor without a memory tag."""


class Ledger(TorchDispatchMode):
    """Counts storages within ``with ledger:``.

    Args:
        model: its parameters and buffers are the weights; the outputs of its head are the logits.
        host: the host's memory is measured, so that what is kept there counts.
        strict: a tensor of a step that is allocated outside of the model needs a memory tag.

    Raises:
        UntaggedError: at the end of a strict block, if a tag was missing.

    Example:
        >>> model = nn.Linear(256, 256, bias=False)
        >>> with Ledger(model) as ledger:
        ...     loss = model(torch.ones(1, 256)).sum()
        >>> ledger.peak().kinds["weights"]
        262144
    """

    def __init__(self, model: nn.Module | None = None, host: bool = True, strict: bool = False) -> None:
        super().__init__()
        self.host, self.strict = host, strict
        self._stepping = False
        self._untagged: dict[str, None] = {}  # call sites, in order
        self.pieces: list[Piece] = []
        self._known: weakref.WeakKeyDictionary[Any, Piece] = weakref.WeakKeyDictionary()
        self._events = 0
        self._now = 0
        self._moment = "forward"
        self._most: dict[str, tuple[int, int]] = {}  # by moment: bytes, and after which event
        self._phase = ""
        self._updating = False
        self._head = output_embeddings(model) if model is not None else None
        if model is not None:
            self.add((t for t in (*model.parameters(), *model.buffers())), "weights")

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts tensors that exist already."""
        for tensor in tensors:
            self._count(tensor, kind)

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """All that is allocated in the block is of one kind."""
        before, self._phase = self._phase, kind
        try:
            yield
        finally:
            self._phase = before

    def peak(self) -> Split:
        """What was alive at the peak."""
        return max(self.peaks().values(), key=lambda split: split.total)

    def peaks(self) -> dict[str, Split]:
        """What was alive at the peaks of the forward passes, of the backward pass, and of the time after it."""
        return {moment: self._alive(event) for moment, (_, event) in self._most.items()}

    def _alive(self, event: int) -> Split:
        kinds = dict.fromkeys(KINDS, 0)
        alive = [p for p in self.pieces if p.born <= event and (p.died is None or p.died > event)]
        for piece in alive:
            kind = self._settled(piece)
            kinds[kind] = kinds.get(kind, 0) + piece.size
        largest = sorted(((p.size, self._settled(p)) for p in alive), reverse=True)[:8]
        return Split(kinds, tuple(largest))

    def kept(self) -> int:
        """Bytes that are alive now."""
        return self._now

    def __enter__(self) -> Ledger:
        with contextlib.ExitStack() as stack:
            stack.enter_context(recording_tags())
            for handle in (
                register_optimizer_step_pre_hook(self._first_order_update),
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module, always_call=True),
            ):
                stack.callback(handle.remove)
            super().__enter__()
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._opened.close()
        if self._untagged and error[0] is None:
            raise UntaggedError("tensors are allocated without a memory tag at " + ", ".join(self._untagged))

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        push("logits" if module is self._head else "model")

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        pop()

    def _first_order_update(self, optimizer: Any, *unused: Any) -> None:
        """To the end of the step, what survives is the state of a first-order optimizer."""
        if not isinstance(optimizer, FirstOrder | ZerothOrder):  # those contain the optimizer whose step it is
            self._updating = True

    def begin_step(self) -> None:
        """A step begins."""
        self._updating, self._moment, self._stepping = False, "forward", True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # the guard against compilation costs as much as the call
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _current_graph_task_id() != -1:
            self._moment = "backward"
        elif self._moment == "backward":
            self._moment = "update"
        kind = ""
        for value in tree_iter(result):
            if isinstance(value, Tensor) and _storage(value) not in self._known:
                kind = kind or self._kind()
                self._count(value, kind)
        return result

    def _count(self, tensor: Tensor, kind: str) -> None:
        storage = _storage(tensor)
        if storage in self._known:
            return
        self._events += 1
        elsewhere = kind == "host" and not self.host
        piece = Piece(0 if elsewhere else storage.nbytes(), "directions" if kind == "host" else kind, self._events)
        self._known[storage] = piece
        self.pieces.append(piece)
        weakref.finalize(storage, self._free, piece).atexit = False
        self._now += piece.size
        if self._now > self._most.get(self._moment, (-1, 0))[0]:
            self._most[self._moment] = self._now, self._events

    def _free(self, piece: Piece) -> None:
        self._events += 1
        piece.died = self._events
        self._now -= piece.size

    def _kind(self) -> str:
        """The kind of a new tensor: the phase's, unless the host's memory does not count and it is there."""
        elsewhere = not self.host and "host" in tags()
        return self._phase if self._phase and not elsewhere else self._purpose()

    def _purpose(self) -> str:
        """The kind of a new tensor, by the innermost tag; ``… if kept`` where its lifetime decides."""
        if _current_graph_task_id() != -1:
            return "gradients if kept"
        in_model = False
        for tag in reversed(tags()):
            if tag == "model":
                in_model = True
            elif in_model:  # of the modules within the head
                return tag if tag == "logits" else "activations"
            elif tag == "update" or (tag == "backward update" and self._updating):
                return "optimizer state if kept"
            else:
                return "gradients if kept" if tag == "backward update" else tag
        if self.strict and self._stepping and not in_model:
            self._untagged[_call_site()] = None
        return "activations" if in_model else "temporary"

    def _settled(self, piece: Piece) -> str:
        """Its kind, now that its lifetime is known."""
        kind, _, condition = piece.kind.partition(" if ")
        if not condition:
            return kind
        if kind == "gradients":  # an intermediate product is freed within the backward pass, a gradient lives to the update
            return kind if piece.died is None or piece.died - piece.born > _INTERMEDIATE_EVENTS else "temporary"
        return kind if piece.died is None else "temporary"


#: A tensor of a backward pass that survives so many events is a gradient.
_INTERMEDIATE_EVENTS = 40


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _call_site() -> str:
    """``file:line`` of the innermost code of this package outside of this module."""
    home = __name__.partition(".")[0]
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == home and module != __name__:
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_qualname})"
        frame = frame.f_back  # type: ignore[assignment]
    return "code of another package"
