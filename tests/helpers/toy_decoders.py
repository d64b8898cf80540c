"""Small decoders whose layers do not all add to one residual stream, or whose logits are not what the head gave."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention with four heads of ``x`` to ``source``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor, causal: bool) -> Tensor:
        heads = [t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (self.query(x), self.key(source), self.value(source))]
        return self.out(F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, post_norm: bool, cross: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross = Attention(width) if cross else None
        self.between = nn.LayerNorm(width) if cross else None

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if self.post_norm:
            x = self.first(x + self.attention(x, x, True))
            return self.second(x + self.down(F.gelu(self.up(x))))
        normed = self.first(x)
        x = x + self.attention(normed, normed, True)
        if self.cross is not None:
            x = x + self.cross(self.between(x), memory.expand(len(x), -1, -1), False)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Decoder(nn.Module):
    """A language model of two blocks.

    Args:
        cap: soft cap of the logits, c tanh(z / c).
        scale: factor of the logits.
        enlarge: factor of the initial matrices.
    """

    def __init__(
        self,
        *,
        width: int = 32,
        post_norm: bool = False,
        cross: bool = False,
        cap: float | None = None,
        scale: float = 1.0,
        enlarge: float = 1.0,
        vocabulary: int = 100,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__()
            self.embed, self.places = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
            self.blocks = nn.ModuleList(Block(width, post_norm, cross) for _ in range(2))
            self.norm = nn.Identity() if post_norm else nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.register_buffer("memory", torch.randn(1, 5, width))
        self.cap, self.scale = cap, scale
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(enlarge)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x, self.memory)
        logits = self.scale * self.head(self.norm(x))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
