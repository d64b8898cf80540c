"""Which parts of a model come and go: its repeated blocks, found by structure, and of them the tensors worth moving."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.weights.quantized_linear import owner_of
from zotune.weights.structure import longest_lists, outermost_lists

#: Vectors, matrices of fewer numbers and narrow ones (adapters) stay: they are little of a model, and updates of many of them go together.
SMALL = 1 << 8
NARROW = 16


class NotOffloadable(ValueError):
    """A model cannot be offloaded as asked."""


@dataclass(frozen=True)
class Part:
    """Modules that are needed at the same time, a block as a rule: ``names`` in the model, and the modules."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]


@dataclass
class Moving:
    """One tensor that comes and goes: in the model, and what stands for it while it is away."""

    name: str
    owner: nn.Module | None
    local: str
    tensor: Tensor
    away: Tensor

    @classmethod
    def of(cls, name: str, owner: nn.Module | None, local: str, tensor: Tensor, device: torch.device) -> Moving:
        # The right shape, dtype and device, and no memory. A weight that is used where nobody brings it in makes all results NaN.
        nothing = math.nan if tensor.dtype.is_floating_point else 0
        return cls(name, owner, local, tensor, torch.full((), nothing, dtype=tensor.dtype, device=device).expand(tensor.shape))


def find(model: nn.Module, named: str | Sequence[str] | None = None) -> list[Part]:
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
    return [Part((f"{name}.{index}",), (block,)) for name, module in found for index, block in enumerate(module)]


def large(tensor: Tensor) -> bool:
    """Whether a tensor is worth moving."""
    if tensor.dim() < 2 or tensor.numel() < SMALL:
        return False
    return min(tensor.shape) > 0 and max(tensor.shape[-2:]) < NARROW * min(tensor.shape[-2:])


def tensors(part: Part, elsewhere: Counter[int]) -> list[tuple[str, nn.Module, str, Tensor]]:
    """(name, owner, name within it, tensor) of what comes and goes of a part: large, and nobody else's.

    Args:
        part: of the model.
        elsewhere: by id of a tensor, in how many parts of the model it occurs.
    """
    found: dict[int, tuple[str, nn.Module, str, Tensor]] = {}
    for name, module in zip(part.names, part.modules, strict=True):
        for path, owner in module.named_modules():
            for local, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                if tensor is not None and elsewhere[id(tensor)] == 1 and _plain(tensor) and large(tensor):
                    found.setdefault(id(tensor), (".".join(filter(None, (name, path, local))), owner, local, tensor))
    return list(found.values())


def occurrences(model: nn.Module, parts: Sequence[Part]) -> Counter[int]:
    """By id of a tensor: in how many of the parts, or in the rest of the model, it occurs."""
    counted: Counter[int] = Counter()
    inside = {id(m) for part in parts for module in part.modules for m in module.modules()}
    for part in parts:
        counted.update({id(t) for module in part.modules for m in module.modules() for t in _own(m)})
    counted.update({id(t) for m in model.modules() if id(m) not in inside for t in _own(m)})
    return counted


def moving_of(parts: Sequence[Part], model: nn.Module, device: torch.device) -> list[list[Moving]]:
    """The tensors that come and go of each part."""
    elsewhere: Counter[int] = occurrences(model, parts)
    found = [[Moving.of(*one, device) for one in tensors(part, elsewhere)] for part in parts]
    if not all(found):
        name = parts[found.index([])].names[0]
        raise NotOffloadable(
            f"{name} holds no matrix of its own that could be away (what another library has quantized cannot): name the lists of blocks."
        )
    return found


def _own(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None)


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is one piece of memory. Others (weights quantized by torchao or bitsandbytes) stay where they are."""
    return type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor and owner_of(tensor) is None


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values; none for the weight of a layer in few bits, which stands for others."""
    if owner_of(tensor) is not None:
        return 0
    return tensor.numel() * torch.empty(0, dtype=tensor.dtype).element_size()
