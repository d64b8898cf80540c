"""The ledger: every tensor that is alive while a step runs, what it is for, and the moment at which they are most.

Tensors are counted by their storages, when torch makes them and when they are freed, as torch's own ``MemTracker`` does
(``torch.distributed._tools``). That one knows the kinds of a backward pass; the ledger also tells what zeroth-order training keeps memory
for, by whose code made a tensor: it looks up the call stack. The same ledger serves a real step and one that is rehearsed without data.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zotune.first_order import FirstOrder
from zotune.optimizer import ZerothOrder

#: What memory is for, in the order of tables and charts.
KINDS = ("weights", "gradients", "optimiser state", "activations", "directions", "logits", "temporary")

_HOME = str(Path(__file__).resolve().parents[1]) + "/"
#: Files of zotune whose tensors are directions, or weights moved along them.
_DIRECTIONS = tuple(
    _HOME + name
    for name in (
        *("directions.py", "counter.py", "quantiles.py", "neighbours.py", "coordinates.py", "chosen.py", "unformed.py"),
        *("stacked_parameters.py", "lending.py", "precision.py", "forward_mode.py", "subspaces/", "kernels/"),
    )
)
#: Functions of stacked_parameters.py and lending.py whose own tensors are what a layer gives on.
_OUTPUTS = {
    *("_linear", "_dense_linear", "_beside", "_addmm", "_embedding", "_looked_up", "_layer_norm", "_rms_norm", "_affine", "_by_block"),
    *("thin", "spread", "apply"),
}
_STACKED, _SIDE_PATH = (_HOME + "stacked_parameters.py", _HOME + "lending.py"), _HOME + "side_path.py"
_LOGITS, _OBJECTIVE, _BATCHES = _HOME + "token_scores.py", _HOME + "objectives.py", _HOME + "stacking.py"
#: Where tensors are the host's, whatever device the model is on.
_HOST = _HOME + "subspaces/guide.py"
_UPDATES = tuple(_HOME + name for name in ("applying.py", "rules/", "first_order/", "replayed.py", "anchored.py", "shaping.py"))


@dataclass
class Piece:
    """A storage: its bytes, its kind, and between which two events it lived (``died`` None: to the end)."""

    size: int
    kind: str
    born: int
    died: int | None = None


@dataclass(frozen=True)
class Split:
    """Bytes by kind at the peak, and of the largest tensors then: (bytes, kind)."""

    kinds: dict[str, int]
    largest: tuple[tuple[int, str], ...] = ()

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


class Ledger(TorchDispatchMode):
    """Counts storages from ``with ledger:`` on.

    Args:
        model: its parameters and buffers are the weights; what its head makes are the logits.
        host: whether the memory in question is the host's, so that what is kept there counts.

    Example:
        >>> model = nn.Linear(256, 256, bias=False)
        >>> with Ledger(model) as ledger:
        ...     loss = model(torch.ones(1, 256)).sum()
        >>> ledger.peak().kinds["weights"]
        262144
    """

    def __init__(self, model: nn.Module | None = None, host: bool = True) -> None:
        super().__init__()
        self.host = host
        self.pieces: list[Piece] = []
        self._known: weakref.WeakKeyDictionary[Any, Piece] = weakref.WeakKeyDictionary()
        self._events = 0
        self._now = 0
        self._moment = "forward"
        self._most: dict[str, tuple[int, int]] = {}  # by moment: bytes, and after which event
        self._phase = ""
        self._updating = False
        self._head = _head(model) if model is not None else None
        self._head_code: CodeType | None = None if self._head is None else type(self._head).forward.__code__
        if model is not None:
            self.add((t for t in (*model.parameters(), *model.buffers())), "weights")

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._count(tensor, kind)

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """For the length of a block all that is made is of one kind."""
        before, self._phase = self._phase, kind
        try:
            yield
        finally:
            self._phase = before

    def peak(self) -> Split:
        """What was alive when it was most."""
        return max(self.peaks().values(), key=lambda split: split.total)

    def peaks(self) -> dict[str, Split]:
        """What was alive when it was most, in the forward passes, in the backward pass, and after it."""
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

    # -- counting -------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Ledger:
        self._hook = register_optimizer_step_pre_hook(self._first_order_update)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _first_order_update(self, optimizer: Any, *unused: Any) -> None:
        """From here to the end of the step, what survives is a first-order optimiser's state."""
        if not isinstance(optimizer, FirstOrder | ZerothOrder):  # those hold the optimizer whose step it is
            self._updating = True

    def begin_step(self) -> None:
        """A step begins."""
        self._updating, self._moment = False, "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1:
            self._moment = "backward"
        elif self._moment == "backward":
            self._moment = "update"
        kind = ""
        for value in tree_iter(result):
            if isinstance(value, Tensor) and _storage(value) not in self._known:
                kind = kind or self._phase or self._purpose()
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

    # -- what for -------------------------------------------------------------------------------------------------------------------

    def _purpose(self) -> str:
        """The kind of what is being made, by the innermost frames that tell; ``… if kept`` where its fate decides."""
        if torch._C._current_graph_task_id() != -1:
            return "gradients if kept"
        frame = sys._getframe(2)
        in_model = False
        while frame is not None:
            code = frame.f_code
            name = code.co_filename
            if code is self._head_code and frame.f_locals.get("self") is self._head:
                return "logits"
            if name.startswith(_HOME):
                if code.co_name in ("weighted", "combine", "_add_weighted") and not in_model:
                    return "gradients" if code.co_name != "_add_weighted" else "directions"
                if name == _HOST:
                    return "host"
                if name == _SIDE_PATH or (name in _STACKED and code.co_name in _OUTPUTS):
                    return "activations"
                if name.startswith(_DIRECTIONS):
                    return "directions"
                if name == _LOGITS:
                    return "activations" if code.co_name in ("_select", "_behind_own_tokens", "scored_logits") else "logits"
                if name == _OBJECTIVE:
                    return "activations"
                if name == _BATCHES:
                    return "temporary"
                if in_model:
                    return "activations"
                if name.startswith(_UPDATES):
                    return "optimiser state if kept" if self._updating or "first_order" not in name else "gradients if kept"
                if name.endswith("zotune/memory/step.py"):
                    return "activations"
            elif name.endswith("nn/modules/module.py"):
                in_model = True
            frame = frame.f_back  # type: ignore[assignment]
        return "activations" if in_model else "temporary"

    def _settled(self, piece: Piece) -> str:
        """Its kind, now that its fate is known."""
        kind, _, condition = piece.kind.partition(" if ")
        if not condition:
            return kind
        if kind == "gradients":  # a product within the backward pass dies within it, a gradient lives to the update
            return kind if piece.died is None or piece.died - piece.born > _PASSING else "temporary"
        return kind if piece.died is None else "temporary"


#: A tensor of a backward pass that so many events outlives is a gradient.
_PASSING = 40


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if get is not None else None
    except NotImplementedError:
        head = None
    return head if isinstance(head, nn.Module) else None
