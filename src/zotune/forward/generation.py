"""Generation at every point of an evaluation: all points, prompts and samples in one batch of rows, a token each at a time.

Each row is under its own point's weights, from the prompt to the last token. What rows can share: the samples of a prompt at one point
share the forward of the prompt. Points share nothing but the stored weights, since from the first perturbed layer on their states differ.
Rows that have ended leave the batch, as far as all points can spare equally many.

A token is the best one (greedy), or is sampled with the keyed noise of its row and place (:mod:`zotune.rng.gumbel`): the same noise at
every point.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from zotune.forward.active import Evaluation, active
from zotune.io.memory_tags import tagged
from zotune.rng.gumbel import gumbel, sample_keys
from zotune.weights.computed_linear import is_computed

#: The place behind a completion's last token.
NOTHING = -100
#: The method of a cache of transformers that selects rows.
SELECT = "batch_select_indices"
#: Rows leave the batch where at most this share of it is still going: moving the others' cached states has a price.
GOING = 0.75


@dataclass(frozen=True)
class Sampling:
    """How completions are chosen.

    Args:
        max_new_tokens: longest completion.
        stops: ids of tokens that end a completion.
        pad: id of the padding.
        temperature: τ of softmax(z / τ); 0: the best token.
        top_p: sampled from the fewest tokens whose probabilities sum to this, at least.
        top_k: sampled from so many best tokens; 0: from all.
        num_samples: completions of each row.

    Raises:
        ValueError: a number is out of range.
    """

    max_new_tokens: int
    stops: tuple[int, ...] = ()
    pad: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number of at least 0 (0: the best token), not {self.temperature!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p!r}.")
        if self.num_samples > 1 and not self.temperature:
            raise ValueError(f"{self.num_samples} completions a prompt at temperature 0 are all the same: set a temperature, such as 1.")


class Generated(NamedTuple):
    """Completions, row-major by prompt and sample.

    Attributes:
        tokens: ids (R · samples, T), :data:`NOTHING` behind the token that ended a completion.
        finite: whether all of a completion's logits were finite, (R · samples,).
    """

    tokens: Tensor
    finite: Tensor


@tagged("activations")
@torch.no_grad()
def generate(model: nn.Module, ids: Tensor, mask: Tensor, keys: Tensor | None, sampling: Sampling) -> Generated:
    """Completions of prompts under the weights of the evaluation that is going on, or of the model as it is.

    Args:
        model: a causal language model of transformers or PEFT, or an engine's.
        ids, mask: of the prompts, (R, P), padded on the left.
        keys: of the rows, int64, (R,); None at temperature 0.
        sampling: lengths and choice.

    Raises:
        ValueError: the model's forward takes or returns something else than that of a causal language model.
    """
    noise = None if keys is None or not sampling.temperature else sample_keys(keys, sampling.num_samples).reshape(-1)
    if is_computed(model):
        return _by_engine(model, ids, mask, noise, sampling)
    with active().kept():
        return _Decoder(model, sampling, active()).decode(ids, mask, noise)


@torch.no_grad()
def forced_logprobs(model: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """Sum of log-probabilities of given continuations (R, T), evaluated a token at a time as :func:`generate` does, (R,).

    It varies smoothly with the weights, so evaluations that generate are compared by it.
    """
    scores: list[Tensor] = []

    def force(logits: Tensor, rows: Tensor, place: int) -> Tensor:
        wanted = tokens[rows, place]
        scores.append(logits.float().log_softmax(dim=1).gather(1, wanted.unsqueeze(1)).squeeze(1))
        return wanted

    if is_computed(model):
        return _forced_by_engine(model, ids, mask, tokens)
    with active().kept():
        one = Sampling(tokens.shape[1], (), sampling.pad)
        _Decoder(model, one, active(), force).decode(ids, mask, None)
    return torch.stack(scores).sum(dim=0)


@tagged("activations")
def choose(logits: Tensor, keys: Tensor | None, place: int, sampling: Sampling) -> Tensor:
    """The next token of every row, int64, (R,).

    Args:
        logits: (R, vocabulary).
        keys: of the rows; None: greedy.
        place: of the token in its completion.
        sampling: temperature and truncation.
    """
    if keys is None:
        return logits.argmax(dim=1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k and sampling.top_k < scores.shape[1]:
        least = scores.topk(sampling.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        mass = ordered.softmax(dim=1)
        before = mass.cumsum(dim=1) - mass  # of better tokens
        scores = scores.masked_fill(torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= sampling.top_p), -torch.inf)
    unique, place_of = keys.unique(return_inverse=True)  # rows at other points have the same noise
    return scores.add_(gumbel(unique, place, scores.shape[1])[place_of]).argmax(dim=1)


class _Decoder:
    """The loop over tokens of one batch.

    Args:
        model: the model.
        sampling: lengths and choice.
        evaluation: whose rows these are.
        pick: ``pick(logits, rows, place)`` in place of :func:`choose`.
    """

    def __init__(
        self, model: nn.Module, sampling: Sampling, evaluation: Evaluation, pick: Callable[[Tensor, Tensor, int], Tensor] | None = None
    ) -> None:
        self.wrapper, self.sampling, self.evaluation, self.pick = model, sampling, evaluation, pick
        self.virtual = _virtual_tokens(model)
        self.model = model.get_base_model() if self.virtual else model  # type: ignore[operator]
        known = set(_parameters_of(model))
        self.takes_positions = "position_ids" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def decode(self, ids: Tensor, mask: Tensor, noise: Tensor | None) -> Generated:
        sampling, samples = self.sampling, self.sampling.num_samples
        logits, cache, mask = self._prompts(ids, mask)
        if samples > 1:
            index = torch.arange(len(ids), device=ids.device).repeat_interleave(samples)
            logits, mask, cache = logits[index], mask[index], _selected(cache, index)
        total = mask.shape[0]
        tokens = torch.full((total, sampling.max_new_tokens), NOTHING, dtype=torch.int64, device=ids.device)
        finite = torch.ones(total, dtype=torch.bool, device=ids.device)
        stops = torch.tensor(sampling.stops, dtype=torch.int64, device=ids.device)
        rows = torch.arange(total, device=ids.device)  # of the batch, by their places in the result
        going = torch.ones(total, dtype=torch.bool, device=ids.device)  # of the batch
        for place in range(sampling.max_new_tokens):
            keys = None if noise is None else noise[rows]
            chosen = choose(logits, keys, place, sampling) if self.pick is None else self.pick(logits, rows, place)
            finite[rows] &= _sound(logits) | ~going
            tokens[rows[going], place] = chosen[going]
            going = going & ~torch.isin(chosen, stops)
            if place + 1 == sampling.max_new_tokens or not bool(going.any()):
                break
            kept = self._kept(going) if hasattr(cache, SELECT) else None
            if kept is not None:
                rows, going, chosen, mask = rows[kept], going[kept], chosen[kept], mask[kept]
                cache = _selected(cache, kept)
                self.evaluation.narrow(len(kept))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits, cache = self._next(chosen.masked_fill(~going, sampling.pad), mask, cache)
        return Generated(tokens, finite)

    def _prompts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any, Tensor]:
        """Logits behind the prompts, the cache, and the mask of what is in it."""
        inputs: dict[str, Any] = {"input_ids": ids}
        places = (mask.cumsum(dim=1) - 1).clamp_min(0) + self.virtual
        if self.virtual:  # PEFT's own forward would put the learned tokens before every new one again
            rows, wrapper = len(ids), cast(Any, self.wrapper)
            mask = torch.cat([mask.new_ones(rows, self.virtual), mask], dim=1)
            if wrapper.active_peft_config.peft_type == "PREFIX_TUNING":
                inputs["past_key_values"] = wrapper.get_prompt(rows, max_cache_len=mask.shape[1])
            else:
                embedded = wrapper.word_embeddings(ids)
                inputs = {"inputs_embeds": torch.cat([wrapper.get_prompt(batch_size=rows).to(embedded.dtype), embedded], dim=1)}
                places = torch.cat([torch.arange(self.virtual, device=ids.device).expand(rows, -1), places], dim=1)
        positions = {"position_ids": places} if self.takes_positions else {}
        return *self._call(**inputs, attention_mask=mask, **positions), mask

    def _next(self, chosen: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        positions = {"position_ids": mask.sum(dim=1, keepdim=True) - 1} if self.takes_positions else {}
        return self._call(input_ids=chosen.unsqueeze(1), attention_mask=mask, past_key_values=cache, **positions)

    def _call(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits of the last place, (R, vocabulary), and the cache."""
        output = self.model(**inputs, use_cache=True, **self.last_only)
        logits, cache = getattr(output, "logits", None), getattr(output, "past_key_values", None)
        if logits is None or cache is None:
            raise ValueError(
                f"{type(self.model).__name__} does not return logits and past_key_values, as a causal language model with a cache does: "
                "rewards need such a model."
            )
        return logits[:, -1], cache

    def _kept(self, going: Tensor) -> Tensor | None:
        """The batch's rows that stay, equally many of each block; None: all."""
        by_block = going.view(self.evaluation.blocks, -1)
        width = int(by_block.sum(dim=1).max())
        if width > GOING * by_block.shape[1]:
            return None
        order = by_block.int().argsort(dim=1, descending=True, stable=True)[:, :width].sort(dim=1).values
        first = torch.arange(len(by_block), device=going.device).unsqueeze(1) * by_block.shape[1]
        return (order + first).reshape(-1)


def _sound(logits: Tensor) -> Tensor:
    """Whether the best logit of each row is a number, which it is not where any is NaN, (R,)."""
    return logits.amax(dim=1).isfinite()


def _selected(cache: Any, index: Tensor) -> Any:
    """The cache of these rows."""
    if not hasattr(cache, SELECT):
        raise ValueError(f"the rows of a {type(cache).__name__} cannot be copied: set num_generations=1, or take more prompts a step.")
    getattr(cache, SELECT)(index)
    return cache


def _virtual_tokens(model: nn.Module) -> int:
    """Learned tokens that a PEFT model puts before every text.

    Raises:
        ValueError: they are neither a prefix nor a soft prompt.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return 0
    if config.peft_type not in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"):
        raise ValueError(f"completions cannot be generated under {config.peft_type}: take LoRA, a prefix or a soft prompt.")
    return int(config.num_virtual_tokens)


def _parameters_of(model: nn.Module) -> list[str]:
    """Names that the forward of a model takes; of a wrapper's the model's within it."""
    base = getattr(model, "get_base_model", lambda: model)()
    return [*inspect.signature(base.forward).parameters]


def _forced_by_engine(model: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """:func:`forced_logprobs` in one evaluation of prompts and continuations."""
    texts, rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)], len(ids)
    further = tokens.shape[1] - 1  # the last token is no input
    inputs, seen = ids.new_zeros(rows, ids.shape[1] + further), mask.new_zeros(rows, ids.shape[1] + further)
    for row, text in enumerate(texts):
        inputs[row, : len(text)], inputs[row, len(text) : len(text) + further] = text, tokens[row, :further]
        seen[row, : len(text) + further] = 1
    places = torch.tensor([len(text) - 1 for text in texts]).unsqueeze(1) + torch.arange(tokens.shape[1])
    logits = model.scored_logits({"input_ids": inputs, "attention_mask": seen}, places)  # type: ignore[operator]
    return logits.float().log_softmax(dim=2).gather(2, tokens.unsqueeze(2)).sum(dim=(1, 2))


def _by_engine(model: Any, ids: Tensor, mask: Tensor, noise: Tensor | None, sampling: Sampling) -> Generated:
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    finite = torch.ones(len(prompts) * sampling.num_samples, dtype=torch.bool)

    def pick(logits: Any, rows: list[int], place: int) -> Any:
        scores = torch.from_numpy(logits)
        finite[rows] &= _sound(scores)
        return choose(scores, None if noise is None else noise[rows], place, sampling).numpy()

    found = model.generate_tokens(prompts, sampling.max_new_tokens, sampling.stops, pick, sampling.num_samples)
    tokens = torch.full((len(found), sampling.max_new_tokens), NOTHING, dtype=torch.int64)
    for row, completion in enumerate(found):
        tokens[row, : len(completion)] = torch.tensor(completion, dtype=torch.int64)
    return Generated(tokens, finite)
