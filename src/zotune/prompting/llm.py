"""A local causal language model in the form in which trace-opt calls one: :class:`LocalLLM`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from zotune.forward.generation import Sampling, generate
from zotune.tasks import context_limit, is_encoder
from zotune.training.arguments import ModelArguments
from zotune.training.loading import load_model, load_tokenizer, plan_model
from zotune.weights.computed_linear import is_computed

#: Tokens of a reply that must fit behind the problem, at least.
LEAST_REPLY = 64


class LocalLLM:
    """Replies of a causal language model, of transformers or of an engine.

    Args:
        model: on the device where it generates.
        tokenizer: its tokenizer; without a chat template the messages are plain text.
        config: its configuration, for the length of its context.
        max_new_tokens: longest reply, in tokens.
        temperature: of sampling; 0: the best token.
        seed: of sampling; the global generators are not touched.

    Raises:
        ValueError: it is no causal language model.
    """

    def __init__(self, model: Any, tokenizer: Any, config: Any, *, max_new_tokens: int, temperature: float, seed: int):
        if is_encoder(config) or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"--llm writes text, and {config.model_type} is no causal language model: choose one that was trained on chats."
            )
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.limit, _ = context_limit(tokenizer, config)
        generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [tokenizer.eos_token_id, *(generation if isinstance(generation, list) else [generation])]
        self.stops = tuple(dict.fromkeys(int(token) for token in ends if token is not None))

    def __call__(self, messages: Sequence[Mapping[str, str]], number: int = 0, **others: Any) -> SimpleNamespace:
        """The reply to messages, at ``.choices[0].message.content``.

        Args:
            messages: each with ``role`` and ``content``.
            number: of the call, which determines what is sampled.
            others: what remote services take, such as ``response_format``; without effect.

        Raises:
            ValueError: the messages leave no place for a reply in the model's context.
        """
        ids = list(self.tokenizer(self.text(messages), add_special_tokens=not self.chats, verbose=False)["input_ids"])
        most = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - len(ids))
        if most < LEAST_REPLY and most < self.max_new_tokens:
            raise ValueError(
                f"the problem has {len(ids)} tokens and the context of --llm {self.limit}, which leaves no place for a reply: choose a "
                "model with a longer context."
            )
        device = torch.device("cpu") if is_computed(self.model) else next(self.model.parameters()).device
        prompt = torch.tensor([ids], device=device)
        digest = hashlib.sha256(f"{self.seed}/llm/{number}".encode()).digest()
        key = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
        sampling = Sampling(most, self.stops, temperature=self.temperature)
        tokens = generate(self.model, prompt, torch.ones_like(prompt), key if self.temperature else None, sampling).tokens[0].tolist()
        text = self.tokenizer.decode([token for token in tokens if token >= 0], skip_special_tokens=True)
        return reply(text)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages as the model reads them: by the chat template, else one after the other."""
        if not self.chats:
            return "\n\n".join(each["content"].strip() for each in messages) + "\n"
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except Exception:  # a template that knows no system's message
            joined = [{"role": "user", "content": "\n\n".join(each["content"] for each in messages)}]
            return str(self.tokenizer.apply_chat_template(joined, tokenize=False, add_generation_prompt=True))


def reply(text: str) -> SimpleNamespace:
    """A reply of a language model in the form of remote services."""
    return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])


def load_llm(name: str, model: ModelArguments, device: torch.device, **options: Any) -> LocalLLM:
    """The language model of a folder, hub id or GGUF file; ``options``: of :class:`LocalLLM`."""
    args = ModelArguments(name, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
    plan = plan_model(args, "zotune prompt --llm")
    tokenizer = load_tokenizer(plan, args)
    if is_encoder(plan.config):
        raise ValueError(
            f"--llm writes text, and {plan.config.model_type} is no causal language model: choose one that was trained on chats."
        )
    network, _ = load_model(plan, args, device)
    return LocalLLM(network if is_computed(network) else network.to(device), tokenizer, plan.config, **options)
