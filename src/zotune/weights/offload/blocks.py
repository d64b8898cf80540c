"""Which tensors of a model are offloaded: the large ones of its repeated blocks, found by structure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zotune.weights.offload.stores import TensorSpec
from zotune.weights.quantized_linear import owner_of
from zotune.weights.structure import longest_lists, outermost_lists

#: Vectors, matrices of fewer elements and narrow ones (adapters) are not offloaded: they are small, and many are updated together.
SMALL = 1 << 8
NARROW = 16


class NotOffloadable(ValueError):
    """A model cannot be offloaded as requested."""


@dataclass(eq=False)
class OffloadedTensor:
    """One offloaded tensor: its name in the model, its owner and name there, and the placeholder for its data."""

    name: str
    owner: nn.Module | None
    local: str
    tensor: Tensor
    placeholder: Tensor

    @classmethod
    def of(cls, name: str, owner: nn.Module | None, local: str, tensor: Tensor, device: torch.device) -> OffloadedTensor:
        # The right shape, dtype and device, and no memory. A weight that is used without being loaded makes all results NaN.
        value = math.nan if tensor.dtype.is_floating_point else 0
        return cls(name, owner, local, tensor, torch.full((), value, dtype=tensor.dtype, device=device).expand(tensor.shape))

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.tensor.dtype, tuple(self.tensor.shape))


@dataclass(eq=False)
class Block:
    """Modules that compute together; ``names`` in the model. The rest belongs to the stream that loads it.

    Attributes:
        index: in the store.
        pending: writes to run when the block is next loaded, which keep ``pending_bytes`` in memory.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    index: int = 0
    tensors: list[OffloadedTensor] = field(default_factory=list)
    pending: list[Callable[[], object]] = field(default_factory=list)
    pending_bytes: int = 0


def find_blocks(model: nn.Module, named: str | Sequence[str] | None = None) -> list[Block]:
    """The blocks of a model, in the order of their names.

    Args:
        model: any module.
        named: the list of blocks (``"model.layers"``), several such lists, or None: the longest list of modules of one class that lies
            in no other block.

    Raises:
        ValueError: there is no list of that name, or none at all.
    """
    if named is not None:
        modules = dict(model.named_modules())
        found = []
        for name in [named] if isinstance(named, str) else named:
            module = modules.get(name)
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
                lists = ", ".join(n for n, m in outermost_lists(model)) or "none"
                raise NotOffloadable(f"the model has no list of blocks {name!r}; its lists of modules are: {lists}.")
            found.append((name, module))
    else:
        found = [*longest_lists(model)]
        if not found:
            raise NotOffloadable(
                f"no repeated blocks are found in {type(model).__name__}: offloading needs an nn.ModuleList of at least two modules of one "
                "class; name the lists with blocks=..., or train the model without offloading."
            )
    return [Block((f"{name}.{index}",), (block,)) for name, module in found for index, block in enumerate(module)]


def offloaded_tensors(blocks: Sequence[Block], model: nn.Module, device: torch.device) -> list[list[OffloadedTensor]]:
    """The tensors of each block that are offloaded: large ones that occur nowhere else."""
    occurrences = _occurrences(model, blocks)
    found = [[OffloadedTensor.of(*one, device) for one in _tensors(block, occurrences)] for block in blocks]
    if not all(found):
        name = blocks[found.index([])].names[0]
        raise NotOffloadable(
            f"{name} has no matrix of its own to offload (one that another library has quantized cannot be): name the lists of blocks."
        )
    return found


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values; 0 for the ``weight`` of a quantized layer, which takes no memory."""
    if owner_of(tensor) is not None:
        return 0
    return tensor.numel() * torch.empty(0, dtype=tensor.dtype).element_size()


def _tensors(block: Block, occurrences: Counter[int]) -> list[tuple[str, nn.Module, str, Tensor]]:
    """(name, owner, name within it, tensor) of the tensors of a block to offload."""
    found: dict[int, tuple[str, nn.Module, str, Tensor]] = {}
    for name, module in zip(block.names, block.modules, strict=True):
        for path, owner in module.named_modules():
            for local, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                if tensor is not None and occurrences[id(tensor)] == 1 and _is_plain(tensor) and _is_large(tensor):
                    found.setdefault(id(tensor), (".".join(filter(None, (name, path, local))), owner, local, tensor))
    return list(found.values())


def _occurrences(model: nn.Module, blocks: Sequence[Block]) -> Counter[int]:
    """By id of a tensor: in how many of the blocks, or in the rest of the model, it occurs."""
    counted: Counter[int] = Counter()
    inside = {id(m) for block in blocks for module in block.modules for m in module.modules()}
    for block in blocks:
        counted.update({id(t) for module in block.modules for m in module.modules() for t in _own(m)})
    counted.update({id(t) for m in model.modules() if id(m) not in inside for t in _own(m)})
    return counted


def _own(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None)


def _is_large(tensor: Tensor) -> bool:
    if tensor.dim() < 2 or tensor.numel() < SMALL:
        return False
    return min(tensor.shape) > 0 and max(tensor.shape[-2:]) < NARROW * min(tensor.shape[-2:])


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one piece of memory; external ones (quantized by torchao or bitsandbytes) are not."""
    return type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor and owner_of(tensor) is None
