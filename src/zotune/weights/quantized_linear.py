"""Linear layers quantized to 8 or 4 bits, trained by low-rank factors beside them.

W (m, n) is stored as Q ⊙ s: signed integers of 8 bits with a scale a row, or of 4 bits (two a byte) with a scale for each 32 elements
of a row. It is written only where Q itself is trained (``subspaces.codes``). What training adds to W otherwise is a sum of products L Rᵀ,
stored as factors in float32: requantizing at every fold would round it away. A run of T steps that folds every ν steps stores rank · T / ν
columns, so a long run wants a long interval.

``weight`` is zeros of W's shape that take no memory. Low-rank coordinates of it (``subspaces``) and PEFT adapters work by low-rank hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.weights import placement
from zotune.weights.structure import linear_of, matching_children, replace_children, unshared_linears

#: Attribute of a weight that names its layer.
_OWNER = "_zotune_quantized"

#: Elements that share a scale in 4 bits.
GROUP = 32
#: Elements dequantized at a time on a CPU.
STRIP = 1 << 20


class QuantizedLinear(nn.Linear):
    """y = f x (Q ⊙ s)ᵀ + (x R) Lᵀ + b, f the product of all weight decays; a ``weight`` that is overridden in a forward is added to Q ⊙ s.

    Args:
        linear: the layer to quantize, by rounding to nearest. Its bias is shared.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, or 4 bits and a number of inputs that is no multiple of 32.
    """

    codes: Tensor
    scales: Tensor
    factor: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        if bits not in (8, 4):
            raise ValueError(f"weights can be quantized to 8 or 4 bits, not {bits!r}.")
        self.bits = bits
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if bits == 4 and self.in_features % GROUP:
            raise ValueError(f"4 bits need inputs in multiples of {GROUP}, and this layer has {self.in_features}: use int8.")
        with placement.loaded(linear.weight):
            self._pack(linear.weight.detach())
        self._register_factors(linear.weight.device)
        weight = self._zero_weight(linear.weight.dtype, linear.weight.device)
        self.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias

    def _pack(self, weight: Tensor) -> None:
        group = GROUP if self.bits == 4 else self.in_features
        grouped = weight.float().view(self.out_features, -1, group)
        scales = grouped.abs().amax(dim=2, keepdim=True).clamp_min(1e-12) / self.largest
        self.register_buffer("codes", self._packed((grouped / scales).round().to(torch.int8).view(self.out_features, -1)))
        self.register_buffer("scales", scales.squeeze(2))

    def _packed(self, integers: Tensor) -> Tensor:
        return integers if self.bits == 8 else (integers[:, ::2] & 15) | (integers[:, 1::2] << 4)

    def _register_factors(self, device: torch.device) -> None:
        self.register_buffer("factor", torch.ones((), device=device))
        self.register_buffer("left", torch.zeros(self.out_features, 0, device=device))
        self.register_buffer("right", torch.zeros(self.in_features, 0, device=device))

    def _zero_weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros((), dtype=dtype, device=device).expand(self.out_features, self.in_features)

    @property
    def largest(self) -> int:
        """The largest magnitude of an element of Q."""
        return 7 if self.bits == 4 else 127

    def integers(self, rows: slice = slice(None)) -> Tensor:
        """Rows of Q, int8; those of 8 bits are the stored ones."""
        codes = self.codes[rows]
        if self.bits == 4:
            codes = torch.stack([(codes << 4) >> 4, codes >> 4], dim=2)  # shifts of signed bytes keep the sign
        return codes.reshape(len(codes), -1)

    def write_integers(self, integers: Tensor) -> None:
        """Q ← ``integers`` (m, n), int8, in place."""
        self.codes.copy_(self._packed(integers))

    def scaled(self, integers: Tensor, rows: slice = slice(None)) -> Tensor:
        """f Q ⊙ s of other integers, or of fractions, in place of rows of Q; float32."""
        scales = (self.scales[rows] * self.factor).unsqueeze(2)
        return integers.view(*scales.shape[:2], -1).to(torch.float32, copy=True).mul_(scales).view(len(integers), -1)

    def unpacked(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of f Q ⊙ s, in ``dtype``."""
        return self.scaled(self.integers(rows), rows).to(dtype)

    def dense(self) -> Tensor:
        """The weight f Q ⊙ s + L Rᵀ, in the layer's dtype."""
        return self.with_factors(self.left, self.right)

    def with_factors(self, left: Tensor, right: Tensor) -> Tensor:
        """f Q ⊙ s + left · rightᵀ in the layer's dtype."""
        with placement.loaded(self.codes):
            whole = self.unpacked(slice(0, self.out_features), torch.float32)
        return whole.addmm_(left, right.T).to(self.weight.dtype)

    def add(self, left: Tensor, right: Tensor, keep: float, *, anchored: bool = False) -> None:
        """W ← keep · W + left · rightᵀ; ``anchored``: only what training has added is multiplied by ``keep``."""
        if keep != 1.0 and not anchored:
            self.factor = self.factor * keep
        self.left = torch.cat([self.left * keep, left], dim=1)
        self.right = torch.cat([self.right, right], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and x.requires_grad:
            return self._with_trained(x, rows, rows @ self.unpacked(slice(0, self.out_features), x.dtype).T)
        out = rows.new_empty(len(rows), self.out_features)
        height = max(1, STRIP // self.in_features) if x.device.type == "cpu" else self.out_features
        for top in range(0, self.out_features, height):
            strip = slice(top, min(top + height, self.out_features))
            torch.mm(rows, self.unpacked(strip, x.dtype).T, out=out[:, strip])
        return self._with_trained(x, rows, out)

    def _with_trained(self, x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """``out`` + (x R) Lᵀ + x · weightᵀ where the weight is overridden + b; ``rows`` is x in the shape of ``out``."""
        if self.left.shape[1]:
            out = out + (rows @ self.right.to(x.dtype)) @ self.left.T.to(x.dtype)
        out = out.view(*x.shape[:-1], self.out_features)
        bias, weight = self.bias, self.weight
        if type(weight) is not nn.Parameter:
            return out + F.linear(x, weight, bias)
        return out if bias is None else out + bias

    # -- state ----------------------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        stored = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in stored.items():
            if getattr(self, name).dtype != before.dtype:  # scales stay float32 in a half-precision model
                self._buffers[name] = before.to(self.weight.device)
        self.weight.data = self._zero_weight(self.weight.dtype, self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("left", "right"):
            if prefix + name in state_dict:  # the number of columns may differ
                self._buffers[name] = torch.empty_like(state_dict[prefix + name], device=self.factor.device)
        # A checkpoint of ordinary layers is ignored here: the factors come with the optimizer's state.
        buffers = {prefix + name: buffer for name, buffer in self._buffers.items()} if prefix + "weight" in state_dict else {}
        super()._load_from_state_dict({**buffers, **state_dict, prefix + "weight": self.weight}, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def own(layer: QuantizedLinear) -> QuantizedLinear:
    """Register the layer for :func:`owner_of`; the layer."""
    setattr(layer.weight, _OWNER, layer)
    return layer


def owner_of(parameter: Tensor) -> QuantizedLinear | None:
    """The quantized or external layer whose ``weight`` a parameter is; None for other parameters."""
    return getattr(parameter, _OWNER, None)


def quantize(model: nn.Module, bits: int, *, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Quantize the Linear layers of a model in place, one after the other.

    Args:
        model: any module.
        bits: 8 or 4.
        skip: last names of layers to leave unchanged; a layer that shares its weight (a tied head) is left unchanged anyway.

    Returns:
        The model.

    Raises:
        ValueError: it has no Linear layer to quantize.

    Example:
        >>> model = quantize(nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2)), 8)
        >>> model[0].codes.dtype
        torch.int8
    """
    chosen = unshared_linears(model, (nn.Linear,), skip)
    if not chosen:
        raise ValueError("the model has no Linear layer of its own to quantize.")
    replace_children(chosen, lambda linear: own(QuantizedLinear(linear, bits)))
    return model


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace quantized layers by ordinary Linear layers with their trained weights, in place; the model."""
    layers = matching_children(model, lambda _, child: isinstance(child, QuantizedLinear))
    replace_children(layers, lambda layer: linear_of(nn.Parameter(layer.dense(), requires_grad=layer.weight.requires_grad), layer.bias))
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has layers of this kind."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def dense_state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a module with dense weights for its quantized layers; ``prefix`` stands before the names."""
    state = model.state_dict(prefix=prefix)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            here = f"{prefix}{name}." if name else prefix
            parts = {part: state.pop(here + part) for part in module._buffers}
            state[here + "weight"] = module.with_factors(parts["left"], parts["right"])  # with pending factors
    return state
