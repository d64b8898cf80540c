"""Linear layers whose weights another library holds in few bits, trained by factors beside them.

torchao keeps a quantized weight as a tensor subclass in an ordinary Linear, bitsandbytes as packed numbers in a Linear of its own. Either
way the layer computes y = x Wᵀ, and that is all that is asked of it: such layers are found by what their weight is, not by their class, W
itself where it is needed is what the layer makes of unit vectors, and nothing is ever written to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zotune.weights.quantized_linear import QuantizedLinear, own
from zotune.weights.structure import matching_children, replace_children

#: Unit vectors that a layer is given at a time.
UNITS = 256


def is_external(parameter: Tensor) -> bool:
    """Whether a weight is in a form of another library: a tensor subclass of its own, or packed whole numbers."""
    sharded = hasattr(parameter, "full_tensor")
    return not sharded and (is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point())


class ExternalLinear(QuantizedLinear):
    """y = f h(x) + (x R) Lᵀ + b, h the layer as it was, without its bias, and whatever ``weight`` is lent.

    h is no submodule: it is in no state dict and no list of parameters, for nothing in it is ever another than its library has made it.

    Args:
        linear: the layer to take over; it becomes ``external``, and its bias this layer's.
    """

    external: nn.Linear

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        linear.bias = None  # type: ignore[assignment]
        self.__dict__["external"] = linear
        weight, device = linear.weight, linear.weight.device
        dtype = next((d for d in _dtypes(self, linear, weight) if d is not None and d.is_floating_point), torch.get_default_dtype())
        self.register_buffer("factor", torch.ones((), device=device))
        self.register_buffer("left", torch.zeros(self.out_features, 0, device=device))
        self.register_buffer("right", torch.zeros(self.in_features, 0, device=device))
        self.weight = nn.Parameter(self._nothing(dtype, device))

    @torch.no_grad()
    def with_factors(self, left: Tensor, right: Tensor) -> Tensor:
        columns = []
        for first in range(0, self.in_features, UNITS):
            count = min(UNITS, self.in_features - first)
            units = torch.zeros(count, self.in_features, dtype=self.weight.dtype, device=self.factor.device)
            units[:, first : first + count].fill_diagonal_(1)
            columns.append(self.external(units).T.float())
        return torch.cat(columns, dim=1).mul_(self.factor).addmm_(left, right.T).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = self.external(x) * self.factor.to(x.dtype)
        if self.left.shape[1]:
            out = out + (x @ self.right.to(x.dtype)) @ self.left.T.to(x.dtype)
        bias, moves = self.bias, self.weight
        if type(moves) is not nn.Parameter:  # lent: what it adds
            return out + F.linear(x, moves, bias)
        return out if bias is None else out + bias

    def _apply(self, fn: Any, recurse: bool = True) -> ExternalLinear:
        super()._apply(fn, recurse)
        self.external._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, external={type(self.external.weight).__name__}"


def pieces(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor) of all that such layers of a model hold."""
    for name, module in model.named_modules():
        if isinstance(module, ExternalLinear):
            yield from _pieces(f"{name}.held", module.external.weight)


def _pieces(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _pieces(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.data


def wrap(model: nn.Module) -> nn.Module:
    """Have low-rank methods train the Linear layers whose weights torchao or bitsandbytes holds in few bits, in place.

    What is learnt stays beside the weights, as factors (see :func:`zotune.weights.quantized_linear.quantize`). Adapters (PEFT) need none of this.

    Args:
        model: any module, after it has been quantized.

    Returns:
        The model.

    Raises:
        ValueError: it has no such layer.
    """
    found = external_layers(model)
    if not found:
        raise ValueError("no Linear layer of the model has a weight that another library holds in few bits: nothing is to be done.")
    replace_children(found, lambda linear: own(ExternalLinear(linear)))
    return model


def external_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of the Linear layers whose weights another library holds."""
    return matching_children(model, lambda _, child: isinstance(child, nn.Linear) and is_external(child.weight))


def _dtypes(layer: ExternalLinear, linear: nn.Linear, weight: Any) -> list[torch.dtype | None]:
    """Where the dtype of the layer's numbers may be told."""
    state = getattr(weight, "quant_state", None)
    return [weight.dtype, None if layer.bias is None else layer.bias.dtype, getattr(state, "dtype", None)]
