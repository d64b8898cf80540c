"""Low-rank hooks: layers that compute with W + A Vᵀ without materializing it.

For y = x Wᵀ the low-rank part is (x V) Aᵀ: two thin products, added to the layer's output by a forward hook. W is only read, so it may be
tied or quantized. What a layer type adds is in its file of ``forward.layers``. Leading dimensions of x do not matter. Where an engine
computes the layer, there is no output to add to: the engine reads the factors (:meth:`LowRankHook.product`).
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor, nn

from zotune.forward.layers import LayerRule, rule_of
from zotune.subspaces import LowRankCoordinate

#: The attribute of a module that holds its hook, by which a second optimizer on the same model is noticed.
MARK = "_zotune_low_rank_hook"


class LowRankHook:
    """The low-rank hook of one module. The module's state dict contains the merged weight W + A Vᵀ.

    Args:
        module: a module for which :meth:`fits` holds.
        local_name: the attribute that holds the parameter, ``"weight"``.
        coordinate: the low-rank coordinate of that parameter.
        owner: whose hook it is, as long as it lives.

    Raises:
        ValueError: another optimizer's hook is on the module already, or its layer type has none.
    """

    def __init__(self, module: nn.Module, local_name: str, coordinate: LowRankCoordinate, owner: object) -> None:
        if MARK in module.__dict__:
            raise ValueError(
                f"{coordinate.name} is already trained by another ZerothOrder optimizer; call that optimizer's remove_hooks() first."
            )
        rule = rule_of(module)
        if rule is None:
            raise ValueError(f"{coordinate.name}: a {type(module).__name__} has no low-rank hook.")
        self.coordinate = coordinate
        self.local_name = local_name
        self.rule: LayerRule = rule
        self.add_low_rank = rule.add_low_rank
        self.calls = 0
        self.module = module
        self.owner: weakref.ref[object] | None = weakref.ref(owner)
        module.__dict__[MARK] = self
        self._handles: list[Any] = []
        if rule.by_engine:
            module.product, module.shrunk = self.product, self.shrunk  # type: ignore[assignment]
        else:
            self._handles.append(module.register_forward_hook(self.forward_hook))
        self._handles += [
            module.register_state_dict_post_hook(_SaveMerged(self)),
            module.register_load_state_dict_pre_hook(self.load_hook),
        ]

    @staticmethod
    def fits(module: nn.Module, local_name: str) -> bool:
        """Whether the layer type of ``module`` has a low-rank hook for that parameter."""
        rule = rule_of(module)
        return local_name == "weight" and rule is not None and rule.has_hook(module)

    def forward_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        self.calls += 1
        product = self.product()
        return None if product is None else self.add_low_rank(*product, args[0], output)

    def product(self) -> tuple[Tensor, Tensor] | None:
        """(left, right) of what is added to the stored weight at the point that is evaluated; None for nothing."""
        coordinate = self.coordinate
        core = coordinate.hook_core
        if core is None or (core is coordinate.core and not coordinate.pending):
            return None
        return coordinate.factors(core)

    def shrunk(self) -> float:
        """What the next fold multiplies by what earlier ones added."""
        return self.coordinate.keep

    def load_hook(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        if self.rule.is_loaded(module, state_dict, prefix + self.local_name):
            self.coordinate.reset()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"owner": None}  # the hook of a copied model belongs to no optimizer

    @property
    def abandoned(self) -> bool:
        """Whether its optimizer no longer exists."""
        return self.owner is None or self.owner() is None

    def remove(self) -> None:
        """Remove the hook from the module."""
        for handle in self._handles:
            handle.remove()
        if self.rule.by_engine:
            self.module.product = self.module.shrunk = None  # type: ignore[assignment]
        self.module.__dict__.pop(MARK, None)


def release_abandoned(model: nn.Module) -> None:
    """Fold the updates of optimizers that no longer exist, or are those of the model that this one is a copy of, and remove their hooks."""
    hooks = [module.__dict__[MARK] for module in model.modules() if MARK in module.__dict__]
    if hooks:
        gc.collect()  # a scheduler and its optimizer refer to each other
    for hook in hooks:
        if hook.abandoned:
            hook.coordinate.fold()
            hook.remove()


class _SaveMerged:
    """State-dict hook that saves the merged weight. (A class, because torch sets an attribute on the hook.)"""

    def __init__(self, hook: LowRankHook) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        self.hook.rule.save_merged(module, self.hook.coordinate, state_dict, prefix + self.hook.local_name)
