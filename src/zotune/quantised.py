"""Linear layers held in 8 bits, of which only the scales are parameters: what QZO trains (2505.13430).

W (m, n) is kept as diag(s) Q, Q signed bytes with one float32 scale s_i for each row. Q is a buffer and never moves, so a zeroth-order
method that trains the model's parameters trains the scales: m numbers for m·n bytes. The products are with Q itself, and the scales are
applied to the output, a vector a layer, so that several points are evaluated in one forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuantisedLinear(nn.Module):
    """y = (x Qᵀ) ⊙ s + b.

    Args:
        linear: the layer to take over; its weight is rounded to Q_ij = round(W_ij / s_i), s_i = max_j |W_ij| / 127. Its bias is shared.
    """

    quantised: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("quantised", (weight / scale.unsqueeze(1)).round().to(torch.int8))
        self.scale = nn.Parameter(scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.quantised.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantise(model: nn.Module, *, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Put the Linear layers of a model in 8 bits, in place, and leave their scales as all that trains.

    Args:
        model: any module.
        skip: last names of layers to leave as they are; a layer whose weight is another module's too (a tied head) is left anyway.

    Returns:
        The model.

    Raises:
        ValueError: it has no Linear layer to quantise.

    Example:
        >>> from zotune import ZerothOrder
        >>> model = quantise(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
        >>> optimizer = ZerothOrder(model, "mezo", lr=1e-3)
        >>> loss = optimizer.step(lambda x: model(x).square().mean(dim=1), torch.ones(3, 4))
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and name not in skip and owners[id(child.weight)] == 1
    ]
    if not chosen:
        raise ValueError("the model has no Linear layer of its own to quantise.")
    model.requires_grad_(False)
    for parent, name, child in chosen:
        setattr(parent, name, QuantisedLinear(child))
    return model
