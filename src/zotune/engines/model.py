"""A causal language model that an inference engine computes, as a module for the rest of zotune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zotune.engines.engine import Choose, Engine, Piece, Row, Watch
from zotune.objectives import output_gradients
from zotune.objectives.final_norm import ScaledRows
from zotune.objectives.output_gradients import OutputGradientRecorder
from zotune.weights.computed_linear import ComputedLinear

#: Logits of sampled positions, at most (64 MiB): a large vocabulary's would take more memory than the rest of an evaluation.
MOST_LOGITS = 2**24


class EngineHead(nn.Module):
    """The head W (vocabulary, d) of an engine's model: its rows and products, without W in memory."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.shape = (engine.vocabulary, engine.width)
        self.rows, self.product = engine.head_rows, engine.head_product


class EngineModel(nn.Module):
    """A causal language model computed by an engine.

    Its submodules stand for the matrices that take low-rank factors, under the names of the original checkpoint. Hooks on them see what
    the engine computes. Inputs come after the evaluation, layers with the same input one after the other. They are zeros at padding, behind
    the last attention also where nothing is scored, and, where output gradients are recorded, at all but scored and sampled positions.
    Outputs come during the evaluation, some texts at a time, without what low-rank factors add.

    Args:
        engine: computes the model.
        config: a configuration, with what the rest of the code reads of it (``vocab_size``, ``max_position_embeddings``).

    Attributes:
        most_logits: logits of sampled positions that are computed for their hidden states behind the last attention, at most.

    Raises:
        ValueError: the engine's model has no matrix that can be trained.
    """

    def __init__(self, engine: Engine, config: Any = None) -> None:
        super().__init__()
        if not engine.matrices:
            raise ValueError("the model has no matrix that low-rank factors can be added to.")
        self.__dict__["engine"] = engine
        self.config = config or SimpleNamespace(vocab_size=engine.vocabulary, max_position_embeddings=engine.context)
        self.matrices: dict[str, ComputedLinear] = {}
        for name, shape in engine.matrices.items():
            self.matrices[name] = layer = ComputedLinear(*shape)
            _put(self, name.split("."), layer)
        self.__dict__["head"] = EngineHead(engine)
        self.most_logits = MOST_LOGITS
        self.__dict__["norm"] = engine.final_norm()
        self.eval()

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.__dict__["engine"]

    @property
    def device(self) -> torch.device:
        """Of the tensors that it takes and returns."""
        return torch.device("cpu")

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.__dict__["head"]

    # -- evaluation -------------------------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        """Logits (R, T, vocabulary) of token ids (R, T), zeros where the attention mask is 0; as ``output.logits``."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        everywhere = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        logits = self.scored_logits({name: tensor for name, tensor in inputs.items() if tensor is not None}, everywhere)
        if attention_mask is not None:
            logits = logits.masked_fill_(attention_mask.unsqueeze(2) == 0, 0.0)
        return SimpleNamespace(logits=logits)

    def scored_logits(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Logits (R, S, vocabulary) at ``positions`` (R, S).

        Args:
            inputs: input_ids (R, T); attention_mask (R, T), or segments (R, T) with the position_ids of packed choices (-1: padding).
            positions: indices along T; at one on padding the logits are those of the row's first token.

        Raises:
            ValueError: a text is longer than the context.
        """
        recorder = output_gradients.active_recorder()
        batch = _Batch(inputs, positions, recorder, self.engine, self.most_logits)
        watch, layers = self._watch(batch, recorder)
        self._set_factors()
        logits = torch.from_numpy(self.engine.decode(batch.rows, watch))
        if watch is not None and layers is not None:
            for name in [name for name in watch.found if name]:  # in the order of the computation
                layers.show(name, watch.found.pop(name))
            if recorder is not None and watch.head:
                self._show_head(watch, recorder, batch)
        return logits[batch.places]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """All that training has added: (left (m, r), right (n, r)) of each matrix that it changed."""
        found = {}
        for name, layer in self.matrices.items():
            product = None if layer.product is None else layer.product()
            folded = layer.left if layer.shrunk is None else layer.left * layer.shrunk()
            parts = [(folded, layer.right), *([] if product is None else [product])]
            left, right = (torch.cat(side, dim=1).contiguous() for side in zip(*parts, strict=True))
            if left.shape[1]:
                found[name] = (left, right)
        return found

    def _set_factors(self) -> None:
        folded = {name: (layer.left, layer.right) for name, layer in self.matrices.items() if layer.left.shape[1]}
        products = {name: layer.product() for name, layer in self.matrices.items() if layer.product is not None}
        self.engine.set_factors(folded, {name: product for name, product in products.items() if product is not None})

    # -- hooks ------------------------------------------------------------------------------------------------------------------------

    def _watch(self, batch: _Batch, recorder: OutputGradientRecorder | None) -> tuple[Watch | None, _Inputs | None]:
        """What the hooks on the matrices want to see."""
        seen = {name: layer for name, layer in self.matrices.items() if layer.watched[0]}
        change = {name: _Change(layer, batch) for name, layer in self.matrices.items() if layer.watched[1]}
        recorded = recorder is not None and recorder.scored is not None
        if not (seen or change or recorded):
            return None, None
        inputs = _Inputs(seen, batch)
        logits = recorder is not None and recorder.wants_logits
        return Watch(frozenset(seen), batch.read if recorded else None, change, recorded, logits, inputs.show), inputs

    def _show_head(self, watch: Watch, recorder: OutputGradientRecorder, batch: _Batch) -> None:
        states = batch.at_outputs([(tokens, x) for tokens, x, _ in watch.found.get("", [])])[batch.places]
        logits = batch.at_outputs(watch.logits)[batch.places] if watch.head_logits else states[..., :0]
        norm: tuple[Tensor, Tensor | None] | None = self.__dict__["norm"]
        if norm is not None:
            weight, bias = norm
            recorder.norm_called(ScaledRows(recorder.kept_rows(states), weight, bias))
        recorder.head_called(states, logits)

    # -- generation -------------------------------------------------------------------------------------------------------------------

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[int],
        choose: Choose | None = None,
        num_samples: int = 1,
    ) -> list[list[int]]:
        """Completions at the current point, as :meth:`zotune.engines.engine.Engine.generate` gives them."""
        for prompt in prompts:
            _check_ids(torch.tensor(prompt, dtype=torch.long), self.engine.vocabulary)
        self._set_factors()
        return self.engine.generate(prompts, max_new_tokens, stops, choose, num_samples)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        """Greedy continuations of prompts (B, P) padded on the left, behind them, (B, P + new tokens), as transformers returns them."""
        if generation_config.do_sample or (generation_config.num_beams or 1) > 1:
            raise ValueError("an engine generates greedily: set do_sample=False and num_beams=1.")
        prompts = [ids[mask > 0].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        stops = generation_config.eos_token_id or []
        stops = [stops] if isinstance(stops, int) else list(stops)
        found = self.generate_tokens(prompts, generation_config.max_new_tokens, stops)
        length = max(map(len, found), default=0)
        pad = generation_config.pad_token_id or 0
        written = torch.tensor([answer + [pad] * (length - len(answer)) for answer in found], dtype=torch.long).view(len(found), length)
        return torch.cat([input_ids, written], dim=1)


class _Batch:
    """A padded batch (R, T) as the texts of an engine, and the way back.

    Attributes:
        rows: the texts.
        positions: the scored positions, (R, S), those on padding moved to the row's first token.
        places: which of all outputs is at each of them, (R, S).
        read: whether a recorder reads the inputs of each token of all rows.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        positions: Tensor,
        recorder: OutputGradientRecorder | None,
        engine: Engine,
        most_logits: int = MOST_LOGITS,
    ) -> None:
        ids = inputs["input_ids"]
        segments = inputs.get("segments")
        mask = inputs.get("attention_mask")
        real = segments >= 0 if segments is not None else torch.ones_like(ids, dtype=torch.bool) if mask is None else mask > 0
        given = inputs.get("position_ids")
        self.shape = ids.shape
        begin = real.int().argmax(dim=1, keepdim=True)
        self.positions = torch.where(real.gather(1, positions), positions, begin)
        wanted, read = torch.zeros_like(real), torch.zeros_like(real)
        wanted.scatter_(1, self.positions, True)
        if recorder is not None and (sample := recorder.sample) is not None:  # behind the last attention, only outputs have hidden states
            recorder.incomplete = len(sample[0]) * engine.vocabulary > most_logits
            read[sample] = True
            if not recorder.incomplete:
                wanted[sample] = True
        wanted &= real
        _check_ids(ids[real], engine.vocabulary)
        self.rows: list[Row] = []
        index, outputs = [], []
        for row, (row_ids, kept, scored) in enumerate(zip(ids, real, wanted, strict=True)):
            length = int(kept.sum())
            if length == 0:
                raise ValueError("a row of the batch has no token: every text needs at least one.")
            part = torch.zeros_like(row_ids) if segments is None else segments[row]
            where = kept.cumsum(0) - 1 if given is None else given[row]
            _check_positions(where[kept & (part == 0)], int(where[kept].max()), engine.context)
            for first in range(0, max(1, int(part.max())), engine.continuations):
                own = (part > first) & (part <= first + engine.continuations)
                piece = kept & ((part == 0) | own)
                found = scored & (piece if not first else own)
                tokens, places, parts = (tensor[piece].to(torch.int32).numpy() for tensor in (row_ids, where, (part - first).clamp_min(0)))
                self.rows.append(Row(tokens, places, parts, found[piece].nonzero()[:, 0].numpy()))
                index.append(row * ids.shape[1] + piece.nonzero()[:, 0])
                outputs.append(row * ids.shape[1] + found.nonzero()[:, 0])
        self.index, self.outputs = torch.cat(index), torch.cat(outputs)  # of each token and output among the elements of the padded batch
        numbers = torch.full((ids.numel(),), -1, dtype=torch.long)
        numbers[self.outputs] = torch.arange(len(self.outputs))
        self.places = numbers.view(self.shape).gather(1, self.positions)
        self._of_token = numbers[self.index]  # the output at each token
        self.read = (wanted | read).flatten()[self.index].numpy()

    def padded(self, pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
        """(R, T, n) of the values (k, n) of some tokens (k,), zeros elsewhere."""
        width = pieces[0][1].shape[1] if pieces else 0
        found = torch.zeros(self.shape.numel(), width)
        for tokens, values in pieces:
            found[self.index[torch.from_numpy(tokens)]] = torch.from_numpy(values)
        return found.view(*self.shape, width)

    def at_outputs(self, pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
        """(outputs, n) of the values (k, n) of some tokens (k,), of which those without an output are left out."""
        found = torch.zeros(len(self.outputs), pieces[0][1].shape[1])
        for tokens, values in pieces:
            places = self._of_token[torch.from_numpy(tokens)]
            found[places[places >= 0]] = torch.from_numpy(values)[places >= 0]
        return found

    def tokens_of(self, states: Tensor, tokens: np.ndarray) -> Tensor:
        """The values (k, n) of some tokens (k,) in a padded tensor (R, T, n)."""
        return states.flatten(0, 1)[self.index[torch.from_numpy(tokens)]]


def rows_of(inputs: Mapping[str, Tensor], positions: Tensor, engine: Engine) -> list[Row]:
    """The texts that :meth:`EngineModel.scored_logits` has an engine evaluate."""
    return _Batch(inputs, positions, None, engine).rows


class _Inputs:
    """Calls the hooks that wait for layers' inputs; matrices with the same input, one after the other, get the same tensor."""

    def __init__(self, layers: Mapping[str, ComputedLinear], batch: _Batch) -> None:
        self.layers, self.batch = layers, batch
        self._last: tuple[object, Tensor] | None = None

    def show(self, name: str, pieces: Sequence[Piece]) -> None:
        key = tuple(key for _, _, key in pieces)
        if self._last is None or self._last[0] != key:
            self._last = key, self.batch.padded([(tokens, x) for tokens, x, _ in pieces])
        self.layers[name](self._last[1])


class _Change:
    """Calls a layer's forward hooks on the output of some tokens."""

    def __init__(self, layer: ComputedLinear, batch: _Batch) -> None:
        self.layer, self.batch = layer, batch

    def __call__(self, tokens: np.ndarray, output: np.ndarray) -> np.ndarray | None:
        layer, batch = self.layer, self.batch
        layer.computed = given = batch.padded([(tokens, output)])
        try:
            found = layer(torch.empty(0))
        finally:
            layer.computed = torch.empty(0)
        return None if found is given else batch.tokens_of(found, tokens).numpy()


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse token ids that the model has not."""
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise ValueError(f"token id {int(wrong[0])} is none of the model's {vocabulary} tokens: take the tokenizer of this model.")


def _check_positions(prompt: Tensor, last: int, context: int) -> None:
    """Refuse positions of a text's first part, and its last one, that an engine cannot compute."""
    if last >= context:
        raise ValueError(
            f"a text has {last + 1} tokens, and the context takes {context}: raise --n_ctx where the model was trained for more, or cut "
            "texts with --max_length."
        )
    if not torch.equal(prompt, torch.arange(len(prompt)) + (prompt[:1] if len(prompt) else 0)):
        raise ValueError("position_ids skip or repeat a position, which an engine does not take: leave them out.")


def _put(parent: nn.Module, path: Sequence[str], layer: nn.Module) -> None:
    """Register a layer under a dotted name; numbers are places in lists."""
    name, *rest = path
    if not rest:
        parent.add_module(name, layer)
        return
    child = parent._modules.get(name)
    if child is None:
        child = nn.ModuleList() if rest[0].isdigit() else nn.Module()
        parent.add_module(name, child)
    _put(child, rest, layer)
