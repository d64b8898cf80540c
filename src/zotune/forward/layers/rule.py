"""Layer rules: all evaluation paths of one layer type.

A layer of weight W can be evaluated at θ + offset in these ways, which are equal up to rounding:

- *general*: the module reads a whole perturbed weight; works for any module without a rule;
- *low-rank hook*: the module computes with the stored W, and :meth:`LayerRule.add_low_rank` adds the product with A Vᵀ;
- *batched*: every block of rows has its own point; torch passes each function that uses a batched parameter to :attr:`LayerRule.batched`;
- *materialized*: W + A Vᵀ is materialized for one product (``materialized`` functions), where that costs less traffic than the hook;
- *lazy*: strips or rows of the perturbed weight are generated inside the function that uses them (``lazy`` functions).

:func:`register` puts the functions of a rule into the dispatch tables, so a new layer type is one new file.
``tests/unit/forward/test_layer_rules.py`` compares all paths of every registered rule on its :meth:`LayerRule.examples`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zotune.forward import batched, lazy_weight, materialized
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.weights.layouts import Layout, register_layout

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Example:
    """A small module of a layer type and its inputs, for the conformance test.

    Attributes:
        label: its name in the test's output.
        build: makes the module, with random weights, float32.
        inputs: makes inputs of so many rows, float32 or ids.
    """

    label: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


class LayerRule:
    """The paths of a layer type; without a path, the general one is taken."""

    #: Whether the stored weight can be written; otherwise it cannot be trained in full space.
    writable: ClassVar[bool] = True
    #: Whether an engine computes with the weight, at one point at a time; the module then has a ``product`` to read its factors from.
    by_engine: ClassVar[bool] = False
    #: Batched forms of torch functions, by the function's name.
    batched: ClassVar[Mapping[str, Function]] = {}
    #: Forms of torch functions with a lazy weight among their arguments.
    lazy: ClassVar[Mapping[Callable[..., Any], Function]] = {}
    #: Forms of torch functions whose second argument is a weight that they may materialize.
    materialized: ClassVar[Mapping[Callable[..., Any], Function]] = {}

    def owns(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this layer type."""
        return False

    def has_hook(self, module: nn.Module) -> bool:
        """Whether :meth:`add_low_rank` is valid for ``module``, of this type; not for a subclass with its own forward."""
        return False

    def add_low_rank(self, left: Tensor, right: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """The output of the layer at W + left · rightᵀ.

        Args:
            left, right: factors (rows of W, r) and (columns of W, r).
            x: the layer's input.
            output: the layer's output with W; may be overwritten.
        """
        raise NotImplementedError(f"{type(self).__name__} has no low-rank hook")

    def is_lazy_in_full(self, module: nn.Module, coordinate: FullCoordinate, buffer: lazy_weight.WeightBuffer) -> bool:
        """Whether ``module`` reads a lazy weight for a full-space matrix that is not thin."""
        return False

    def is_lazy_low_rank(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        """Whether ``module`` reads a lazy weight for low-rank coordinates on the general path."""
        return False

    def materializes(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        """Whether ``module``, the only owner of the weight, may materialize it for one product."""
        return False

    def shared_width(self, module: nn.Module, coordinate: LowRankCoordinate) -> int | None:
        """The width n of an input x that is first multiplied by V, so that layers with the same input share x V; None: not applicable."""
        return None

    def layout(self, module: nn.Module) -> Layout | None:
        """The layout of ``module`` if it is a matrix layer of this type."""
        return None

    def save_merged(self, module: nn.Module, coordinate: LowRankCoordinate, state_dict: dict[str, Any], name: str) -> None:
        """Replace the stored weight ``name`` of a state dict by the merged one."""
        if name in state_dict:
            state_dict[name] = coordinate.merged()

    def is_loaded(self, module: nn.Module, state_dict: Mapping[str, Any], name: str) -> bool:
        """Whether loading a state dict replaces the weight ``name``."""
        return name in state_dict

    def examples(self) -> Iterable[Example]:
        """Small modules of this type, with and without optional parts, for the conformance test."""
        raise NotImplementedError


#: Rules by class name, in order of registration.
RULES: dict[str, LayerRule] = {}


def register(rule: LayerRule) -> None:
    """Add a layer type.

    Raises:
        ValueError: another layer type has registered one of its functions.
    """
    tables: tuple[tuple[dict[Any, Function], Mapping[Any, Function]], ...] = (
        (batched.FUNCTIONS, rule.batched),
        (lazy_weight.FUNCTIONS, rule.lazy),
        (materialized.FUNCTIONS, rule.materialized),
    )
    for table, functions in tables:
        taken = [key for key in functions if key in table]
        if taken:
            raise ValueError(f"{type(rule).__name__}: {taken[0]} is computed by another layer type already.")
        table.update(functions)
    RULES[type(rule).__name__] = rule
    register_layout(rule.layout)


def rule_of(module: nn.Module) -> LayerRule | None:
    """The rule of a module's layer type, the latest registered that owns it; None without one."""
    return next((rule for rule in reversed(RULES.values()) if rule.owns(module)), None)


def add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """output + left @ right in output's dtype; in place where autograd allows, which saves a pass over the output."""
    left, right = left.to(output.dtype), right.to(output.dtype)
    if torch.is_grad_enabled() and output.requires_grad:
        return output + left @ right
    flat = output.view(-1, output.shape[-1])
    flat.addmm_(left.reshape(-1, left.shape[-1]), right)
    return output
