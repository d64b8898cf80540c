"""Small modules with weights of every shape: experts, convolutions, recurrent layers, weights in einsum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
#: Class of transformers without "ForCausalLM", and its configuration; None: a field that the class does not take.
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**EXPERTS, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **EXPERTS, "n_routed_experts": 4, "moe_intermediate_size": 20, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
            "num_key_value_heads": 4,
        },
    ),
    "gpt-oss": ("GptOss", {**EXPERTS, "num_local_experts": 4, "head_dim": 6}),
    "mamba": ("Mamba", {"state_size": 4, **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"))}),
    "falcon-h1": (
        "FalconH1",
        {
            "mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_head": 6, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4,
            "head_dim": 6,
        },
    ),
}  # fmt: skip


class ConvNet(nn.Module):
    """Images (B, 3, 8, 8) to four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.depthwise(F.relu(self.norm(self.first(x))))).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    """Rows (B, 5, 6) to four classes by an LSTM of two layers, batch first or time first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.lstm, self.head = nn.LSTM(6, 12, 2, batch_first=batch_first), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        states = self.lstm(x)[0] if self.batch_first else self.lstm(x.transpose(0, 1))[0].transpose(0, 1)
        return self.head(states[:, -1])


class Einsum(nn.Module):
    """Rows (B, 5, 6) to four classes with weights (3, 20, 24) in einsum, a learned token (1, 1, 6) and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.tensor(1.0))
        self.up, self.heads = nn.Linear(6, 20), nn.Parameter(torch.randn(3, 20, 24) / 5)
        self.down = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.down(torch.tanh(torch.einsum("bti,hij->bj", self.up(x) * self.scale, self.heads) / 3))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "convnet": ConvNet,
    "lstm": lambda: Recurrent(True),
    "lstm, time first": lambda: Recurrent(False),
    "einsum": Einsum,
}
NAMES = [*LANGUAGE_MODELS, *OTHERS]


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A module of this name with weights large enough that every one of them matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in OTHERS:
            return OTHERS[name]().to(dtype).eval()
        import transformers

        kind, fields = LANGUAGE_MODELS[name]
        fields = {key: value for key, value in {**SMALL, **fields, **changes}.items() if value is not None}
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.mul_(6)
    return model


def batch_of(name: str) -> Any:
    """Three examples."""
    generator = torch.Generator().manual_seed(1)
    if name in LANGUAGE_MODELS:
        return torch.randint(0, 40, (3, 7), generator=generator)
    shape = (3, 3, 8, 8) if name == "convnet" else (3, 5, 6)
    return torch.randn(shape, generator=generator), torch.tensor([0, 1, 2])


def losses_of(model: Callable[..., Any], batch: Any) -> Tensor:
    """One loss an example; ``model`` is the module, or any function that stands for it."""
    if isinstance(batch, Tensor):
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), batch[:, 1:], reduction="none").mean(dim=1)
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")
