"""A context of llama.cpp: evaluates groups of texts, each a sequence of one batch, and shows what happens within.

What is computed of a text depends neither on earlier evaluations nor on the size of the context. A group of texts of up to ``n_ubatch``
tokens is one batch; the texts of a group are chosen by their lengths alone.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from zotune.engines.engine import Row, Watch
from zotune.engines.llama_cpp.adapters import Adapter
from zotune.engines.llama_cpp.library import Tensors, last_words, raising

#: Tokens that a context's size is a multiple of, sequences that llama.cpp takes at most.
GRAIN, MAX_SEQUENCES = 256, 256
#: Keys and values where texts are continued: their tokens in widths of the model, and their bytes. Every new token attends to all of them,
#: masked: beyond a few widths that takes longer than the matrices, and larger groups gain nothing.
WIDTHS, MOST_CACHE = 4, 1 << 30


class Group(NamedTuple):
    """Texts of one batch: their rows, and the number of the first of their tokens among those of all rows."""

    rows: list[Row]
    first: int


def grouped(rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Group]:
    """Neighboring rows of together at most ``tokens`` tokens, with ``room`` further ones of each sequence; a longer row is alone."""
    group, size, sequences, first = list[Row](), 0, 0, 0
    for row in rows:
        if group and (size + len(row.ids) + room * (sequences + row.sequences) > tokens or sequences + row.sequences > MAX_SEQUENCES):
            yield Group(group, first)
            group, first, size, sequences = [], first + size, 0, 0
        group.append(row)
        size, sequences = size + len(row.ids), sequences + row.sequences
    if group:
        yield Group(group, first)


class Context:
    """Evaluates batches with a model; made anew where it has to be larger.

    Args:
        lib: the C library.
        model: its model.
        vocabulary: number of tokens.
        longest: most tokens of a text.
        n_threads, n_ubatch: as llama.cpp calls them; n_ubatch: most tokens of a batch.
        cache_type: ggml's number of the type of keys and values.
        weights: names of the matrices by the name of their tensor, and of the head (an empty name), for a watch.

    Attributes:
        most_cached: tokens whose keys and values are kept at a time where texts are continued, unless one text has more.
    """

    def __init__(
        self,
        lib: Any,
        model: Any,
        vocabulary: int,
        longest: int,
        *,
        n_threads: int,
        n_ubatch: int,
        cache_type: int,
        weights: dict[bytes, str],
    ) -> None:
        self.lib, self.model, self.vocabulary, self.longest = lib, model, vocabulary, longest
        self.n_threads, self.n_ubatch, self.cache_type = n_threads, n_ubatch, cache_type
        self._weights = weights
        self._context: Any = None
        self._size = (0, 0, 0)  # tokens, sequences, outputs
        self._adapter: Adapter | None = None
        self._attached = True  # False: the context may still have another adapter than this
        self.tensors = Tensors()
        self._watch: _Watching | None = None
        self._searching = False  # for the places of the adapter's tensors
        self._error: BaseException | None = None
        self._callback = lib.ggml_backend_sched_eval_callback(self._seen)
        self.most_cached = max(n_ubatch, min(WIDTHS * int(lib.llama_model_n_embd(model)), MOST_CACHE // self._bytes_of_a_token()))

    def _bytes_of_a_token(self) -> int:
        """Of its keys and values."""
        lib, model = self.lib, self.model
        head = lib.llama_model_n_embd(model) // max(1, lib.llama_model_n_head(model))
        element = 4 if self.cache_type == lib.GGML_TYPE_F32 else 2
        return max(1, 2 * element * lib.llama_model_n_layer(model) * lib.llama_model_n_head_kv(model) * head)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """The adapter that is added from now on."""
        self._adapter, self._attached = adapter, False
        if self._context is not None:
            self._attach()

    def _attach(self) -> None:
        count = 0 if self._adapter is None else 1
        pointers = (self.lib.llama_adapter_lora_p_ctypes * count)(*[] if self._adapter is None else [self._adapter.pointer])
        with raising():
            failed = self.lib.llama_set_adapters_lora(self._context, pointers, count, (ctypes.c_float * count)(*[1.0] * count))
        if failed:
            raise ValueError(f"llama.cpp did not take an adapter: {last_words() or 'it gives no reason'}.")
        self._attached = True

    def decode(self, rows: Sequence[Row], watch: Watch | None = None) -> np.ndarray:
        """Logits at the outputs of all rows, (Σ outputs, vocabulary) float32."""
        found = np.empty((sum(len(row.outputs) for row in rows), self.vocabulary), np.float32)
        place = 0
        for group in grouped(rows, self.n_ubatch):
            outputs = sum(len(row.outputs) for row in group.rows)
            self._run(group, outputs, watch, whole=len(group.rows) == len(rows))
            logits = self.lib.llama_get_logits(self._context)
            found[place : place + outputs] = np.ctypeslib.as_array(logits, (outputs, self.vocabulary))
            place += outputs
        return found

    def begin(self, rows: Sequence[Row], room: int) -> np.ndarray:
        """Evaluate one group of texts with room for ``room`` further tokens of each sequence, to be continued; logits at their outputs."""
        self._run(Group(list(rows), 0), sum(len(row.outputs) for row in rows), None, room * sum(row.sequences for row in rows))
        return self._logits(sum(len(row.outputs) for row in rows))

    def extend(self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> np.ndarray:
        """Evaluate one further token of each of these sequences; the logits there, (sequences, vocabulary)."""
        owners = [(sequence, 1) for sequence in sequences]
        self._decode(np.array(ids, np.int32), np.array(positions, np.int32), owners, np.ones(len(ids), np.int8))
        return self._logits(len(ids))

    def _logits(self, outputs: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self._context), (outputs, self.vocabulary)).copy()

    def _run(self, group: Group, outputs: int, watch: Watch | None, room: int = 0, whole: bool = False) -> None:
        ids = np.concatenate([row.ids for row in group.rows]).astype(np.int32)
        self._grow(len(ids) + room, sum(row.sequences for row in group.rows), outputs)
        wanted = np.zeros(len(ids), np.int8)
        start = 0
        for row in group.rows:
            wanted[start + row.outputs] = 1
            start += len(row.ids)
        positions = np.concatenate([row.positions for row in group.rows]).astype(np.int32)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._context), True)
        if watch is not None:
            self._watch = _Watching(watch, group.first, wanted, self.n_ubatch, whole)
        self._decode(ids, positions, _sequences(group.rows), wanted)

    def _decode(self, ids: np.ndarray, positions: np.ndarray, sequences: list[tuple[int, int]], wanted: np.ndarray) -> None:
        batch, kept = _batch(self.lib, ids, positions, sequences, wanted)
        self._searching = self._adapter is not None and bool(self._adapter.unseen)
        try:
            with raising():
                failed = self.lib.llama_decode(self._context, batch)
        finally:
            self._watch, self._searching = None, False
            error, self._error = self._error, None
            del kept
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"llama.cpp could not evaluate {len(ids)} tokens (code {failed}): {last_words() or 'it gives no reason'}.")
        if self._adapter is not None and self._adapter.unseen:
            self._adapter.refuse_unseen()

    def _grow(self, tokens: int, sequences: int, outputs: int) -> None:
        """Have a context for so many."""
        if self._context is not None and all(have >= want for have, want in zip(self._size, (tokens, sequences, outputs), strict=True)):
            if not self._attached:
                self._attach()
            return
        if self.model is None:
            raise ValueError("the engine is closed: open its file again.")
        tokens = max(self._size[0], -(-tokens // GRAIN) * GRAIN)
        sequences = min(MAX_SEQUENCES, max(self._size[1], sequences))
        outputs = min(tokens, max(self._size[2], -(-outputs // 32) * 32, sequences))
        self.free()
        wanted = self.lib.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = tokens
        wanted.n_ubatch = min(tokens, self.n_ubatch)
        wanted.n_seq_max, wanted.n_outputs_max = sequences, outputs
        wanted.n_threads = wanted.n_threads_batch = self.n_threads
        wanted.type_k = wanted.type_v = self.cache_type
        wanted.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        wanted.kv_unified = True  # the order of the tokens stays, and a prompt may belong to several sequences
        wanted.no_perf = True
        wanted.cb_eval = self._callback
        with raising():
            self._context = self.lib.llama_init_from_model(self.model, wanted) or None
        if self._context is None:
            raise MemoryError(
                f"llama.cpp has no memory for {tokens} tokens at a time ({last_words() or 'no reason'}): take a smaller --n_ubatch or "
                "per_device_train_batch_size."
            )
        self._attach()
        self._size = (tokens, sequences, outputs)  # last: a context that an interrupt left unfinished is too small for everything

    def close(self) -> None:
        """Free the context, and evaluate no more."""
        self.free()
        self.model = None

    def free(self) -> None:
        """Free the context; the next evaluation makes another."""
        self._size = (0, 0, 0)
        context, self._context = self._context, None  # first: after an interrupt nothing may use or free it again
        if context is not None:
            with raising():
                self.lib.llama_free(context)

    # -- what happens within ----------------------------------------------------------------------------------------------------------

    def _seen(self, pointer: int, ask: bool, _data: Any) -> bool:
        """llama.cpp asks about every tensor whether it is wanted, and shows it when it is computed; False then ends the evaluation."""
        watching, adapter = self._watch, self._adapter
        if watching is None and not self._searching:
            return not ask
        try:
            tensor = self.tensors.at(pointer)
            source = tensor.src[0]
            if tensor.op != self.tensors.product or not source:
                return not ask
            weight = self.tensors.at(source).name
            if self._searching and adapter is not None and b".lora_" in weight:
                adapter.places[weight] = source
            name = self._weights.get(weight)
            if watching is None or name is None or not watching.wants(name):
                return not ask
            if not ask:
                watching.show(self.tensors, name, pointer, tensor.src[1])
            return True
        except BaseException as error:  # it must not pass through C
            self._error = error
            return False


class _Watching:
    """A watch during one batch.

    Args:
        watch: what is wanted.
        first: number of the batch's first token.
        outputs: 1 for its tokens with outputs, 0 for the others.
        n_ubatch: tokens that are evaluated at a time.
        whole: whether the batch is all rows of the watch.
    """

    def __init__(self, watch: Watch, first: int, outputs: np.ndarray, n_ubatch: int, whole: bool) -> None:
        self.watch, self.first, self.outputs, self.n_ubatch = watch, first, outputs, n_ubatch
        self.whole = whole and len(outputs) <= n_ubatch
        self._shown: Counter[str] = Counter()

    def wants(self, name: str) -> bool:
        return self.watch.head if not name else name in self.watch.inputs or name in self.watch.change

    def show(self, tensors: Tensors, name: str, output: int, x: int) -> None:
        watch, start = self.watch, self._shown[name] * self.n_ubatch
        self._shown[name] += 1
        chosen = np.flatnonzero(self.outputs[start : start + self.n_ubatch])

        def tokens(rows: int) -> np.ndarray:
            """The tokens that so many rows are of: behind the last attention there are only those with outputs."""
            every = len(self.outputs[start : start + self.n_ubatch])
            if rows not in (every, len(chosen)):
                raise ValueError(f"llama.cpp computes {rows} rows of {every} tokens in a way that is unknown here.")
            return self.first + start + (np.arange(every) if rows == every else chosen)

        if not name or name in watch.inputs:
            inputs = tensors.read(x)
            numbers = tokens(len(inputs))
            if watch.tokens is not None:
                kept = watch.tokens[numbers]
                numbers, inputs = numbers[kept], inputs[kept]
            if name and watch.done is not None and self.whole:
                watch.done(name, [(numbers, inputs, x)])
            else:
                watch.found.setdefault(name, []).append((numbers, inputs, x))
        if not name and watch.head_logits:
            logits = tensors.read(output)
            watch.logits.append((tokens(len(logits)), logits))
        elif name in watch.change:
            values = tensors.read(output)
            changed = watch.change[name](tokens(len(values)), values)
            if changed is not None:
                tensors.write(output, changed)


def _sequences(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(first sequence, number) of each token: a prompt's token belongs to all continuations of its row."""
    found, base = [], 0
    for row in rows:
        count = row.sequences
        found += [(base, count) if segment == 0 else (base + segment - 1, 1) for segment in row.segments.tolist()]
        base += count
    return found


def _batch(lib: Any, ids: np.ndarray, positions: np.ndarray, sequences: list[tuple[int, int]], wanted: np.ndarray) -> tuple[Any, Any]:
    """llama.cpp's batch, and the arrays that it points to."""
    counts = np.array([count for _, count in sequences], np.int32)
    flat = np.concatenate([np.arange(first, first + count, dtype=np.int32) for first, count in sequences])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    addresses = (flat.ctypes.data + 4 * starts).astype(np.uintp)
    batch = lib.llama_batch()
    batch.n_tokens = len(ids)
    for field, array in (("token", ids), ("pos", positions), ("n_seq_id", counts), ("seq_id", addresses), ("logits", wanted)):
        kind = type(getattr(batch, field))
        setattr(batch, field, ctypes.cast(array.ctypes.data, kind))
    return batch, (ids, positions, counts, flat, addresses, wanted)
