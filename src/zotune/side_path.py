"""Side paths: layers that compute with W + A Vᵀ without forming it.

For y = x Wᵀ the low-rank part is (x V) Aᵀ: two thin products added to the layer's output by a forward hook. W is neither read a second
time nor written, whatever holds it (a plain tensor, a tied one, a quantised one). The same A and V give:

- ``Linear``, weight (m, n):      y += (x V) Aᵀ
- GPT-2's ``Conv1D``, weight (n_in, n_out), y = x W:      y += (x A) Vᵀ
- ``Embedding``, weight (m, n), y = W[ids]:      y += A[ids] Vᵀ

Leading dimensions of x do not matter, so models that flatten (batch, time) before a layer are no special case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zotune.frozen_linear import FrozenLinear
from zotune.subspaces import LowRankCoordinate

#: Where a side path marks its module, so that a second optimiser on the same model is noticed.
MARK = "_zotune_side_path"


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """output + left @ right in output's dtype; in place where autograd does not look on, for that saves a pass over the output."""
    left, right = left.to(output.dtype), right.to(output.dtype)
    if torch.is_grad_enabled() and output.requires_grad:
        return output + left @ right
    flat = output.view(-1, output.shape[-1])
    flat.addmm_(left.reshape(-1, left.shape[-1]), right)
    return output


def _linear(a: Tensor, v: Tensor, x: Tensor, output: Tensor) -> Tensor:
    return _add_product(output, x @ v.to(x.dtype), a.T)


def _conv1d(a: Tensor, v: Tensor, x: Tensor, output: Tensor) -> Tensor:
    return _add_product(output, x @ a.to(x.dtype), v.T)


def _embedding(a: Tensor, v: Tensor, ids: Tensor, output: Tensor) -> Tensor:
    return _add_product(output, nn.functional.embedding(ids, a), v.T)


def _kind(module: nn.Module) -> Any:
    """The side path of a module, None if it has none. Subclasses count only if they keep the forward that the algebra is about."""
    forward = type(module).forward
    if isinstance(module, nn.Linear) and (forward is nn.Linear.forward or isinstance(module, FrozenLinear)):
        return _linear
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward and module.max_norm is None:
        return _embedding  # max_norm rescales the stored rows in place as they are looked up
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return _conv1d
    return None


class SidePath:
    """The side path of one module, attached by hooks; also keeps the module's state dict telling the trained weights.

    Args:
        module: a module for which :meth:`fits` holds.
        local_name: the attribute under which it owns the parameter, ``"weight"``.
        coordinate: the low-rank coordinates of that parameter.

    Raises:
        ValueError: another optimiser's side path is attached to the module already.
    """

    def __init__(self, module: nn.Module, local_name: str, coordinate: LowRankCoordinate) -> None:
        if MARK in module.__dict__:
            raise ValueError(
                f"{coordinate.name} is already trained by another ZerothOrder optimizer; call that optimizer's detach() first."
            )
        self.coordinate = coordinate
        self.local_name = local_name
        self.kind = _kind(module)
        self.fired = 0
        self.module = module
        module.__dict__[MARK] = True
        self._handles = [
            module.register_forward_hook(self.forward_hook),
            module.register_state_dict_post_hook(_SaveMerged(self)),
            module.register_load_state_dict_pre_hook(self.load_hook),
        ]

    @staticmethod
    def fits(module: nn.Module, local_name: str) -> bool:
        return local_name == "weight" and _kind(module) is not None

    def forward_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        self.fired += 1
        coordinate = self.coordinate
        core = coordinate.moved
        if core is None or (core is coordinate.core and not coordinate.pending):
            return None
        return self.kind(*coordinate.factors(core), args[0], output)

    def load_hook(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        if prefix + self.local_name in state_dict or (isinstance(module, FrozenLinear) and prefix + "left" in state_dict):
            self.coordinate.reset()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.module.__dict__.pop(MARK, None)


class _SaveMerged:
    """State-dict hook: what is saved is W + A Vᵀ. (A class, because torch sets an attribute on the hook.)"""

    def __init__(self, path: SidePath) -> None:
        self.path = path

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        name = prefix + self.path.local_name
        if isinstance(module, FrozenLinear):  # a product more, rather than another weight
            factors = self.path.coordinate.pending_factors()
            for part, more in zip(("left", "right"), factors, strict=True):
                if more is not None:
                    state_dict[prefix + part] = torch.cat([state_dict[prefix + part], more], dim=1)
        elif name in state_dict:
            state_dict[name] = self.path.coordinate.merged()
