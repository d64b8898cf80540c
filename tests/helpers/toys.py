"""Small models that more than one test file trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ARCHITECTURES = ("llama", "opt", "gpt2", "qwen2", "bert", "roberta")


def classifier(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Tokens (B, T) to logits (B, T, 4): an embedding, matrices, biases and a norm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).to(dtype)


def batch(size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 20, (size, 5), generator=generator)
    return tokens, tokens % 4


def loss_function(model: nn.Module):
    """Per-example cross-entropy of :func:`classifier` on :func:`batch`."""

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0]).float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch[1], reduction="none").mean(dim=1)

    return losses


def transformer(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random language model (masked for BERT and RoBERTa) of an architecture of ``transformers``, width 32, two layers."""
    import transformers

    small: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    configs: dict[str, tuple[str, str, dict[str, Any]]] = {
        "llama": (
            "LlamaConfig",
            "LlamaForCausalLM",
            {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
        ),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"intermediate_size": 48, "num_key_value_heads": 2}),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}),
        "mistral": ("MistralConfig", "MistralForCausalLM", {"intermediate_size": 48, "num_key_value_heads": 2}),
        "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}),
        "bert": ("BertConfig", "BertForMaskedLM", {"intermediate_size": 48}),
        "roberta": ("RobertaConfig", "RobertaForMaskedLM", {"intermediate_size": 48, "pad_token_id": 1}),
    }
    config_name, model_name, extra = configs[name]
    fields = {"vocab_size": 60} | extra if name == "gpt2" else small | extra
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**{**fields, **changes})
        model = getattr(transformers, model_name)(config).to(dtype)
    # Fresh weights are so small that every path agrees to rounding; larger ones make a wrong path show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def transformer_loss(model: nn.Module):
    def losses(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)

    return losses


def tokens(size: int = 3, length: int = 7) -> Tensor:
    return torch.randint(4, 60, (size, length), generator=torch.Generator().manual_seed(1))


#: Options that make a method's slow clocks tick within a short test.
SHORT: dict[str, Any] = {
    "interval": 7,
    "history": 3,
    "choice": "block:2x2",
    "anchor_batches": 2,
    "anchor_ratio": 1.0,
    "iterations": 2,
    "probes": 3,
}


def names() -> list[str]:
    """All methods but those that train quantized weights alone (see tests/unit/subspaces/test_codes.py)."""
    from zotune import methods

    return [name for name in methods.names() if not methods.get(name).subspace.quantized]


def method(name: str, **options: Any):
    """A method with the options among :data:`SHORT` and ``options`` that it takes."""
    from zotune import methods

    known = methods.options(name)
    short = {**SHORT, "rank": min(3, known.get("rank", 3)), "density": max(0.25, known.get("density", 1))}
    most = 4 if name == "loren" else 15  # what a test has time for
    short |= {"num_directions": min(most, known.get("num_directions", 1)), **options}
    return methods.get(name, **{option: value for option, value in short.items() if option in known})
