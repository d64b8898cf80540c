"""Linear layers held in 8 bits, of which only the scales are parameters: what QZO trains (2505.13430).

W (m, n) is kept as diag(s) Q, Q signed bytes with one float32 scale s_i for each row. Q is a buffer and never moves, so a zeroth-order
method that trains the model's parameters trains the scales: m numbers for m·n bytes. The products are with Q itself, and the scales are
applied to the output, a vector a layer, so that several points are evaluated in one forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.weights.quantized_linear import QuantizedLinear
from zotune.weights.structure import linear_of, matching_children, replace_children, unshared_linears


class TrainableScaleLinear(nn.Module):
    """y = (x Qᵀ) ⊙ s + b.

    Args:
        linear: the layer to take over; its weight is rounded to Q_ij = round(W_ij / s_i), s_i = max_j |W_ij| / 127. Its bias is shared.
            A layer that is held in 8 bits already, and to which nothing was added, gives its numbers and scales as they are.

    Raises:
        ValueError: the layer is held in 4 bits, or has factors beside it.
    """

    quantized: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if isinstance(linear, QuantizedLinear):
            codes, scale = _held(linear)
        else:
            weight = linear.weight.detach().float()
            scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
            codes = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.register_buffer("quantized", codes)
        self.scale = nn.Parameter(scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.quantized.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias

    def dense(self) -> Tensor:
        """diag(s) Q, in the dtype that the weight had."""
        return (self.quantized.float() * self.scale.detach().float().unsqueeze(1)).to(self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _held(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Q and s of a layer that is held in 8 bits."""
    if layer.bits != 8:
        raise ValueError("the scales of 4 bits, one for every 32 numbers of a row, are inside the product and cannot move: use int8.")
    if layer.left.shape[1]:
        raise ValueError(
            "training has put factors beside this layer's weight: thaw the model first (zotune.weights.quantized_linear.dequantize)."
        )
    return layer.codes, layer.scales.squeeze(1) * layer.factor


def quantize(model: nn.Module, *, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Put the Linear layers of a model in 8 bits, in place, and leave their scales as all that trains.

    Args:
        model: any module.
        skip: last names of layers to leave as they are; a layer whose weight is another module's too (a tied head) is left anyway.

    Returns:
        The model.

    Raises:
        ValueError: it has no Linear layer to quantize, or one that is held in 4 bits.

    Example:
        >>> from zotune import ZerothOrder
        >>> model = quantize(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
        >>> optimizer = ZerothOrder(model, "mezo", lr=1e-3)
        >>> loss = optimizer.step(lambda x: model(x).square().mean(dim=1), torch.ones(3, 4))
    """
    chosen = unshared_linears(model, (nn.Linear, QuantizedLinear), skip)
    if not chosen:
        raise ValueError("the model has no Linear layer of its own to quantize.")
    model.requires_grad_(False)
    replace_children(chosen, TrainableScaleLinear)
    return model


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Give a model ordinary Linear layers of what :func:`quantize` and training have made of them, in place; the model."""
    layers = matching_children(model, lambda _, child: isinstance(child, TrainableScaleLinear))
    replace_children(layers, lambda layer: linear_of(nn.Parameter(layer.dense()), layer.bias))
    return model
