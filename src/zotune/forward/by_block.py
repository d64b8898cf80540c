"""Modules that a batched evaluation calls block by block.

A parameter without a batched form (see ``batched``), such as the weights of experts or of a recurrent layer, is no obstacle to a batched
evaluation of the rest of the model. The module that uses it is called once for each block of rows, with the weights of that block, and its
outputs are put together again. Which modules that are is found out when a function without a batched form is called: first the module that
owns the parameter, then its parents, where a parent reads the parameter or the module's inputs do not consist of the batch's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zotune.errors import NotBatchableError
from zotune.forward.batch_context import BatchContext
from zotune.forward.batched import batched_parameter
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate

#: Arguments and outputs that are the same for all blocks.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class ByBlock:
    """The modules of a model that are called block by block.

    Args:
        model: any module.
        owned: the coordinates of each module's own parameters, by id of the module.

    Attributes:
        names: of the modules.
    """

    def __init__(self, model: nn.Module, owned: Mapping[int, Sequence[Coordinate]]) -> None:
        self.names: list[str] = []
        self._owned = owned
        self._modules = dict(model.named_modules())
        self._name_of = {id(module): name for name, module in self._modules.items()}

    def include(self, names: Sequence[str]) -> None:
        """Call the modules of these names block by block from now on."""
        for name in names:
            inside = [known for known in self.names if known.startswith(f"{name}.")]
            self.names = sorted({*self.names, name} - set(inside))

    def knows(self, names: Sequence[str]) -> bool:
        """Whether the model has modules of these names."""
        return all(name in self._modules for name in names)

    def widen(self, module: nn.Module) -> bool:
        """Include ``module``, or the closest of its parents that is not included; False where only the model itself is left."""
        name = self._name_of[id(module)]
        while name and any(name == known or name.startswith(f"{known}.") for known in self.names):
            name = name.rpartition(".")[0]
        if name:
            self.include([name])
        return bool(name)

    @contextmanager
    def active(self, context: BatchContext) -> Iterator[None]:
        """For the length of a block, these modules are called block by block."""
        modules = [self._modules[name] for name in self.names]
        originals = [module.__dict__.get("forward") for module in modules]
        try:
            for module in modules:
                module.__dict__["forward"] = partial(self._call, module, module.forward, context)
            yield
        finally:
            for module, original in zip(modules, originals, strict=True):
                if original is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = original

    def _call(self, module: nn.Module, forward: Callable[..., Any], context: BatchContext, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs for all blocks."""
        if context.block is not None:
            return forward(*args, **kwargs)
        context.reader = module  # of what is not batchable here
        if context.persistent:
            raise NotBatchableError(f"{self._name_of[id(module)]} is called block by block")
        leaves, tree = pytree.tree_flatten((args, kwargs))
        parts = [_by_block(leaf, context) for leaf in leaves]
        own = {id(c) for c in self._owned.get(id(module), ())}
        inside = {id(c): c for part in module.modules() for c in self._owned.get(id(part), ())}
        for coordinate in inside.values():
            if coordinate.thin:
                context.group_z(coordinate)  # of all groups at a time
        hooked = [c for c in inside.values() if isinstance(c, LowRankCoordinate) and c.uses_hook and id(c) not in own]
        offsets = {id(c): context.offsets(c) for c in inside.values()}
        outputs = []
        try:
            for block in range(context.blocks):
                context.block = block
                for coordinate in hooked:
                    coordinate.set_hook_core(context.directions, offsets[id(coordinate)][block])
                some, options = pytree.tree_unflatten([part[block] for part in parts], tree)
                outputs.append(pytree.tree_flatten(forward(*some, **options)))
        finally:
            context.block = None
            for coordinate in hooked:
                coordinate.hook_core = None
        rows, columns = context.total // context.blocks, zip(*(o for o, _ in outputs), strict=True)
        return pytree.tree_unflatten([_together(column, rows) for column in columns], outputs[0][1])


def read(module: nn.Module, coordinate: Coordinate, context: BatchContext) -> Tensor:
    """What a module reads in a batched evaluation: a batched parameter, or the plain one of the current block."""
    if context.block is None:
        context.reader = module
        return batched_parameter(coordinate, context)
    if isinstance(coordinate, LowRankCoordinate) and coordinate.hook_core is not None:
        return coordinate.parameter.detach()  # the hook adds the rest
    return coordinate.at(context.directions, context.offsets(coordinate)[context.block])


def _by_block(leaf: Any, context: BatchContext) -> Sequence[Any]:
    """An argument for each block."""
    if isinstance(leaf, _CONSTANTS) or (isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] == 1 != context.total)):
        return [leaf] * context.blocks
    if isinstance(leaf, Tensor) and leaf.shape[0] % context.total == 0:
        return leaf.chunk(context.blocks)
    kind = type(leaf).__name__
    what = f"of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"of type {kind}"
    advice = " (call the model with use_cache=False)" if kind.endswith("Cache") else ""
    raise NotBatchableError(f"an input {what} does not consist of the batch's rows{advice}")


def _together(parts: Sequence[Any], rows: int) -> Any:
    """The outputs of all blocks of so many rows as one; what all rows of a block share (T5's bias of positions) is repeated for them."""
    if all(isinstance(part, Tensor) and part.dim() for part in parts):
        return torch.cat([part.expand(rows, *part.shape[1:]) if len(part) == 1 else part for part in parts])
    if isinstance(parts[0], _CONSTANTS) and all(part == parts[0] for part in parts):
        return parts[0]
    raise NotBatchableError("an output does not consist of the batch's rows")
