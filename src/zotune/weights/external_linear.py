"""Linear layers whose weights another library has quantized, trained by low-rank factors beside them.

torchao stores a quantized weight as a tensor subclass in an ordinary Linear, bitsandbytes as packed integers in a Linear of its own. Both
compute y = x Wᵀ, and nothing else is assumed: layers are found by their weight, not by their class; W is computed from unit vectors; the
external weight is never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zotune.weights.placement import is_sharded
from zotune.weights.quantized_linear import QuantizedLinear, own
from zotune.weights.structure import matching_children, replace_children

#: Unit vectors to a call of the layer.
UNITS = 256


def is_external(parameter: Tensor) -> bool:
    """Whether another library has quantized a weight: a tensor subclass, or packed integers."""
    return not is_sharded(parameter) and (is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point())


class ExternalLinear(QuantizedLinear):
    """y = f h(x) + (x R) Lᵀ + b, h the external layer without its bias; an overridden ``weight`` is added (see :class:`QuantizedLinear`).

    h is no submodule, so neither state dicts nor parameter lists contain it.

    Args:
        linear: the external layer; its bias becomes this layer's.
    """

    external: nn.Linear

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        linear.bias = None  # type: ignore[assignment]
        self.__dict__["external"] = linear
        weight, device = linear.weight, linear.weight.device
        dtype = next((d for d in _dtypes(self, weight) if d is not None and d.is_floating_point), torch.get_default_dtype())
        self._register_factors(device)
        self.weight = nn.Parameter(self._zero_weight(dtype, device))

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
        return self._with_trained(x, x, self.external(x) * self.factor.to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> ExternalLinear:
        super()._apply(fn, recurse)
        self.external._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, external={type(self.external.weight).__name__}"


def pieces(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor) of everything that external layers of a model store."""
    for name, module in model.named_modules():
        if isinstance(module, ExternalLinear):
            yield from _pieces(f"{name}.held", module.external.weight)  # digests in existing journals contain this name


def _pieces(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _pieces(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.data


def wrap(model: nn.Module) -> nn.Module:
    """Make the Linear layers that torchao or bitsandbytes has quantized trainable by low-rank methods, in place.

    The update stays beside the weights, as factors (see :mod:`zotune.weights.quantized_linear`). PEFT adapters do not need this.

    Args:
        model: any module, after it has been quantized.

    Returns:
        The model.

    Raises:
        ValueError: it has no such layer.
    """
    found = external_layers(model)
    if not found:
        raise ValueError("no Linear layer of the model is quantized by another library: there is nothing to wrap.")
    replace_children(found, lambda linear: own(ExternalLinear(linear)))
    return model


def external_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of the Linear layers that another library has quantized."""

    def matches(_: str, child: nn.Module) -> bool:
        weight = child._parameters.get("weight") if isinstance(child, nn.Linear) else None  # reading a parametrized one computes it
        return weight is not None and is_external(weight)

    return matching_children(model, matches)


def _dtypes(layer: ExternalLinear, weight: Any) -> list[torch.dtype | None]:
    """Candidates for the dtype in which the layer computes."""
    state = getattr(weight, "quant_state", None)
    return [weight.dtype, None if layer.bias is None else layer.bias.dtype, getattr(state, "dtype", None)]
