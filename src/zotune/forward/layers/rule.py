"""What the library knows of one layer type, stated in one file of this package.

A layer of weight W at θ + offset can be evaluated in these ways, and all of them are the same function up to rounding:

- *general*: the module reads a whole perturbed weight; works for any module and needs no rule;
- *low-rank hook*: the module computes with W as stored, and :meth:`LayerRule.add_low_rank` adds what W + A Vᵀ has more;
- *batched*: every block of rows has a point of its own; torch hands each function that a batched parameter is used in to
  :attr:`LayerRule.batched`;
- *materialized*: W + A Vᵀ is formed for one product (``materialized`` functions), where that costs less traffic than the hook;
- *lazy*: strips or rows of the perturbed weight are made inside the function that uses them (``lazy`` functions).

:func:`register` enters the functions of a rule in the dispatch tables, so a new layer type is one new file. ``tests/test_layer_rules.py``
holds every registered rule to the equality of all ways on its :meth:`LayerRule.examples`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zotune.forward import batched as stacked_parameters
from zotune.forward import lazy_weight
from zotune.forward import materialized as formed
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.weights.layouts import Layout, register_layout

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Example:
    """A small module of a layer type and its inputs, for the conformance test.

    Attributes:
        label: names it in the test's output.
        build: makes the module, with random weights, float32.
        inputs: makes what it is called with, of so many rows, float32 or ids.
    """

    label: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


class LayerRule:
    """All that a layer type states of itself; what it leaves out it does not have, and takes the general way."""

    #: Whether the stored weight is ever written; where it is not, it cannot move in full space.
    writable: ClassVar[bool] = True
    #: By the name of the torch function: what computes it with batched parameters among its arguments.
    batched: ClassVar[Mapping[str, Function]] = {}
    #: By torch function: what computes it with a lazy weight among its arguments.
    lazy: ClassVar[Mapping[Callable[..., Any], Function]] = {}
    #: By torch function: what computes it with a weight, its second argument, that it may materialize.
    materialized: ClassVar[Mapping[Callable[..., Any], Function]] = {}

    def owns(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this layer type."""
        return False

    def has_hook(self, module: nn.Module) -> bool:
        """Whether :meth:`add_low_rank` is right for ``module``, of this type: a subclass with a forward of its own may not be."""
        return False

    def add_low_rank(self, left: Tensor, right: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """The output of the layer at W + left · rightᵀ.

        Args:
            left, right: the factors of what is added to W, (rows of W, r) and (columns of W, r).
            x: what the layer was given.
            output: what it computed of that with W; may be overwritten.
        """
        raise NotImplementedError(f"{type(self).__name__} has no low-rank hook")

    def is_lazy_in_full(self, module: nn.Module, coordinate: FullCoordinate, room: lazy_weight.Room) -> bool:
        """Whether ``module`` is lent a lazy weight for a matrix in full space that is not thin."""
        return False

    def is_lazy_low_rank(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        """Whether ``module`` is lent a lazy weight for low-rank coordinates, where it goes the general way."""
        return False

    def materializes(self, module: nn.Module, coordinate: LowRankCoordinate) -> bool:
        """Whether ``module``, which alone owns the weight, may materialize it for one product."""
        return False

    def shared_width(self, module: nn.Module, coordinate: LowRankCoordinate) -> int | None:
        """The width of the input that meets V first, so that layers with the same input share that product; None if there is none."""
        return None

    def layout(self, module: nn.Module) -> Layout | None:
        """The layout of ``module`` if it is a matrix layer of this type."""
        return None

    def save_merged(self, module: nn.Module, coordinate: LowRankCoordinate, state_dict: dict[str, Any], name: str) -> None:
        """Put the merged weight in a state dict that has the stored one under ``name``."""
        if name in state_dict:
            state_dict[name] = coordinate.merged()

    def is_loaded(self, module: nn.Module, state_dict: Mapping[str, Any], name: str) -> bool:
        """Whether loading a state dict replaces the weight that it calls ``name``."""
        return name in state_dict

    def examples(self) -> Iterable[Example]:
        """The smallest modules of this type, with and without what is optional, for the conformance test."""
        raise NotImplementedError


#: Rules by the name of their class, in the order of registration.
RULES: dict[str, LayerRule] = {}


def register(rule: LayerRule) -> None:
    """Enter a layer type.

    Raises:
        ValueError: another one has a function of its own under the same name.
    """
    tables: tuple[tuple[dict[Any, Function], Mapping[Any, Function]], ...] = (
        (stacked_parameters.FUNCTIONS, rule.batched),
        (lazy_weight.FUNCTIONS, rule.lazy),
        (formed.FUNCTIONS, rule.materialized),
    )
    for table, functions in tables:
        taken = [key for key in functions if key in table]
        if taken:
            raise ValueError(f"{type(rule).__name__}: {taken[0]} is computed by another layer type already.")
        table.update(functions)
    RULES[type(rule).__name__] = rule
    register_layout(rule.layout)


def rule_of(module: nn.Module) -> LayerRule | None:
    """The rule of a module's layer type, the latest registered that owns it; None for a module that is of none."""
    return next((rule for rule in reversed(RULES.values()) if rule.owns(module)), None)


def add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """output + left @ right in output's dtype; in place where autograd does not look on, for that saves a pass over the output."""
    left, right = left.to(output.dtype), right.to(output.dtype)
    if torch.is_grad_enabled() and output.requires_grad:
        return output + left @ right
    flat = output.view(-1, output.shape[-1])
    flat.addmm_(left.reshape(-1, left.shape[-1]), right)
    return output
