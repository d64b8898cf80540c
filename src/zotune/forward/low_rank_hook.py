"""Low-rank hooks: layers that compute with W + A Vᵀ without forming it.

For y = x Wᵀ the low-rank part is (x V) Aᵀ: two thin products added to the layer's output by a forward hook. W is neither read a second
time nor written, whatever holds it (a plain tensor, a tied one, a quantized one). What a layer type adds is in its file of
``forward.layers``. Leading dimensions of x do not matter, so models that flatten (batch, time) before a layer are no special case.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zotune.forward.layers import LayerRule, rule_of
from zotune.io.memory_tags import tagged
from zotune.subspaces import LowRankCoordinate

#: Where a low-rank hook marks its module, so that a second optimizer on the same model is noticed.
MARK = "_zotune_low_rank_hook"


class LowRankHook:
    """The low-rank hook of one module; also keeps the module's state dict telling the trained weights.

    Args:
        module: a module for which :meth:`fits` holds.
        local_name: the attribute under which it owns the parameter, ``"weight"``.
        coordinate: the low-rank coordinates of that parameter.

    Raises:
        ValueError: another optimizer's hook is attached to the module already, or its layer type has none.
    """

    def __init__(self, module: nn.Module, local_name: str, coordinate: LowRankCoordinate) -> None:
        if MARK in module.__dict__:
            raise ValueError(
                f"{coordinate.name} is already trained by another ZerothOrder optimizer; call that optimizer's detach() first."
            )
        rule = rule_of(module)
        if rule is None:
            raise ValueError(f"{coordinate.name}: a {type(module).__name__} has no low-rank hook.")
        self.coordinate = coordinate
        self.local_name = local_name
        self.rule: LayerRule = rule
        self.add_low_rank = rule.add_low_rank
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
        """Whether the layer type of ``module`` has a low-rank hook for that parameter."""
        rule = rule_of(module)
        return local_name == "weight" and rule is not None and rule.has_hook(module)

    @tagged("activations")
    def forward_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        self.fired += 1
        coordinate = self.coordinate
        core = coordinate.moved
        if core is None or (core is coordinate.core and not coordinate.pending):
            return None
        return self.add_low_rank(*coordinate.factors(core), args[0], output)

    def load_hook(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        if self.rule.is_loaded(module, state_dict, prefix + self.local_name):
            self.coordinate.reset()

    def remove(self) -> None:
        """Detach it from the module."""
        for handle in self._handles:
            handle.remove()
        self.module.__dict__.pop(MARK, None)


class _SaveMerged:
    """State-dict hook: what is saved is W + A Vᵀ. (A class, because torch sets an attribute on the hook.)"""

    def __init__(self, path: LowRankHook) -> None:
        self.path = path

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        self.path.rule.save_merged(module, self.path.coordinate, state_dict, prefix + self.path.local_name)
