"""Linear layers quantized to 8 bits whose scales are the trained parameters: QZO (2505.13430).

W (m, n) is stored as diag(s) Q: signed bytes Q, a constant buffer, and one float32 scale s_i a row, m parameters for m·n bytes. Products
are with Q; the scales multiply the output, so that one forward evaluates several points.
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
        linear: the layer to quantize: Q_ij = round(W_ij / s_i), s_i = max_j |W_ij| / 127. Its bias is shared. An 8-bit
            :class:`QuantizedLinear` without factors gives its Q and s.

    Raises:
        ValueError: the layer is quantized to 4 bits, or has factors.
    """

    quantized: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if isinstance(linear, QuantizedLinear):
            codes, scale = _scaled_rows(linear)
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
        """diag(s) Q, in the dtype of the original weight."""
        return (self.quantized.float() * self.scale.detach().float().unsqueeze(1)).to(self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _scaled_rows(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Q and s of an 8-bit layer."""
    if layer.bits != 8:
        raise ValueError(
            "the scales of 4 bits, one for every 32 elements of a row, cannot be trained: they are inside the product. Use int8."
        )
    if layer.left.shape[1]:
        raise ValueError("training has added factors to this layer: dequantize it first (zotune.weights.quantized_linear.dequantize).")
    return layer.codes, layer.scales.squeeze(1) * layer.factor


def quantize(model: nn.Module, *, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Quantize the Linear layers of a model to 8 bits in place; their scales are its only trained parameters.

    Args:
        model: any module.
        skip: last names of layers to leave unchanged; a layer that shares its weight (a tied head) is left unchanged anyway.

    Returns:
        The model.

    Raises:
        ValueError: it has no Linear layer to quantize, or one of 4 bits.

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
    """Replace layers with trained scales by ordinary Linear layers, in place; the model."""
    layers = matching_children(model, lambda _, child: isinstance(child, TrainableScaleLinear))
    replace_children(layers, lambda layer: linear_of(nn.Parameter(layer.dense()), layer.bias))
    return model
