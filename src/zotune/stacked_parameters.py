"""Stacked parameters: what a module is lent in a batched evaluation, where every block of rows has weights of its own.

A :class:`Stacked` is a tensor with the parameter's shape and dtype that knows its coordinate. torch hands every function it is used in
to ``__torch_function__`` here, which computes that function with W as it is stored, once for all rows, plus what each block adds:

- ``linear`` (``nn.Linear``), ``addmm`` (GPT-2's ``Conv1D``), ``embedding`` with low-rank coordinates W + (A + s U_g) Vᵀ: one thin
  product of the input, and one batched product with the bias, into which W's product is then added;
- the same with a thin matrix in full space (an adapter's): a weight a block;
- ``linear`` and ``embedding`` with any other matrix in full space: the weights of a direction's blocks, from one draw of it;
- ``layer_norm``, ``rms_norm``, and norms written in Python (a vector multiplied with, or added to, rows): a vector a block.

Whatever else is done with one raises :class:`~zotune.stacking.NotStackable`: no function silently sees unperturbed weights.
Shapes: B = G · S blocks of q rows (of tokens, after flattening); x (B·q, n), V (n, r), U (G, m, r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zotune.coordinates import Coordinate, Offset
from zotune.directions import Key
from zotune.formed import formed, forms
from zotune.frozen_linear import owner_of
from zotune.kernels import norms_for, products_for
from zotune.stacking import NotStackable
from zotune.subspaces import FullCoordinate, LowRankCoordinate
from zotune.unformed import LARGE, STRIP, rows_looked_up

if TYPE_CHECKING:
    from zotune.lending import Lending

#: Most blocks of one forward that a layer forms weights for.
FORMED = 8


class Stacked(torch.Tensor):
    """A parameter with a value a block; made by ``Lending.lend``."""

    plain: Tensor
    coordinate: Coordinate
    lending: Lending
    blockwise: Tensor | None

    @staticmethod
    def of(plain: Tensor, coordinate: Coordinate, lending: Lending, blockwise: Tensor | None = None) -> Stacked:
        stacked = torch.Tensor._make_subclass(Stacked, plain)
        stacked.plain, stacked.coordinate, stacked.lending, stacked.blockwise = plain, coordinate, lending, blockwise
        return stacked

    @property
    def low_rank(self) -> LowRankCoordinate | None:
        return self.coordinate if isinstance(self.coordinate, LowRankCoordinate) else None

    def full(self) -> Tensor:
        """The values of the blocks in the parameter's dtype, (B, *shape); for coordinates in full space."""
        if self.blockwise is not None:
            return self.blockwise
        if not self.coordinate.thin:
            if self.lending.hold:
                raise NotStackable(f"{self.coordinate.name} is read as a whole")
            return torch.stack([self.coordinate.at(self.lending.directions, offset) for offset in self.offsets()])
        return self.lending.values(self.coordinate, self.plain.dtype)

    def offsets(self) -> list[Offset | None]:
        """Where each block evaluates; None: at θ."""
        stack, moves = self.lending.stack, self.coordinate.moves
        return [
            Offset(scale, stack.seed, stack.step, direction) if scale and moves(stack.step, direction) else None
            for direction, scales in zip(stack.directions, stack.scales, strict=True)
            for scale in scales
        ]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            function = _FUNCTIONS.get(name)
            if function is not None:
                return function(*args, **kwargs)
            if name == "__get__" or name in _QUESTIONS:  # dtype, device, shape...
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
        names = [arg.coordinate.name for arg in [*args, *kwargs.values()] if isinstance(arg, Stacked)]
        raise NotStackable(f"the model uses {names[0] if names else 'a parameter'} in {name!r}, which has no batched form")


_QUESTIONS = {"dim", "size", "numel", "element_size", "stride", "is_contiguous", "is_floating_point", "is_complex", "get_device", "__len__"}


def _plain(tensor: Tensor | None) -> Tensor | None:
    return tensor.plain if isinstance(tensor, Stacked) else tensor


def _lending(*tensors: Any) -> Lending:
    for tensor in tensors:
        if isinstance(tensor, Stacked):
            return tensor.lending
    raise NotStackable("a layer is called in a way that has no batched form")


def _no_more(x: Any, **options: Any) -> None:
    if isinstance(x, Stacked) or any(options.values()):
        raise NotStackable("a layer is called in a way that has no batched form")


# -- matrices -----------------------------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b."""
    _no_more(x)
    lending = _lending(weight, bias)
    x = lending.spread(x, 1)
    blocks, width = lending.blocks, weight.shape[0]
    if isinstance(weight, Stacked) and not weight.coordinate.thin:
        return _dense_linear(x, weight, bias).view(*x.shape[:-1], width)
    if isinstance(weight, Stacked) and weight.low_rank is None:
        weights = weight.full().transpose(1, 2)
        rows = x.reshape(blocks, -1, x.shape[-1])
        if isinstance(bias, Stacked):
            product = torch.baddbmm(bias.full().unsqueeze(1), rows, weights)
        else:
            product = torch.bmm(rows, weights) if bias is None else torch.baddbmm(bias, rows, weights)
        return product.view(*x.shape[:-1], width)
    flat, plain = x.reshape(-1, x.shape[-1]), _plain(weight)
    assert plain is not None
    first = bias.full().unsqueeze(1) if isinstance(bias, Stacked) else bias
    if isinstance(weight, Stacked):
        if forms(_low(weight), flat.shape[0] // blocks) and blocks <= FORMED:
            return _formed_linear(flat, weight, bias).view(*x.shape[:-1], width)
        output = _beside(first, x, weight, fixed_first=not _low(weight).transposed)
        if owner_of(_low(weight).parameter) is not None:
            return output.view(*x.shape[:-1], width)  # the layer itself has computed the rest
    else:
        assert first is not None
        output = first.expand(blocks, flat.shape[0] // blocks, width).contiguous()
    return output.view(-1, width).addmm_(flat, plain.T).view(*x.shape[:-1], width)


def _dense_linear(x: Tensor, weight: Stacked, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b, (B, q, m), with a weight a block of a matrix in full space: of all of it, or a strip after the other on a CPU."""
    coordinate, lending = weight.coordinate, weight.lending
    assert isinstance(coordinate, FullCoordinate)
    (height, columns), stack = coordinate.shape, lending.stack
    rows = x.reshape(lending.blocks, -1, columns)
    out = x.new_empty(lending.blocks, rows.shape[1], height)
    strip = max(1, STRIP // columns) if coordinate.numel > LARGE and x.device.type == "cpu" else height
    for group, (direction, scales) in enumerate(zip(stack.directions, stack.scales, strict=True)):
        blocks = range(group * len(scales), (group + 1) * len(scales))
        if lending.hold:
            for block, one in zip(blocks, lending.both(coordinate, direction, scales), strict=True):
                _product(rows[block], one, bias, block, out[block])
            continue
        if not coordinate.moves(stack.step, direction):
            for block in blocks:
                _product(rows[block], weight.plain, bias, block, out[block])
            continue
        key = Key(stack.seed, stack.step, direction, coordinate.name)
        for part, weights in coordinate.together_at(lending.directions, key, scales, strip):
            for block, one in zip(blocks, weights, strict=True):
                if strip >= height:
                    _product(rows[block], one, bias, block, out[block])
                else:
                    torch.mm(rows[block], one.T, out=out[block][:, part])
    if bias is not None and strip < height:
        out += bias.full().unsqueeze(1) if isinstance(bias, Stacked) else bias
    return out


def _formed_linear(flat: Tensor, weight: Stacked, bias: Tensor | None) -> Tensor:
    """y = x (W + A_b Vᵀ)ᵀ + b, (B, q, m), from a weight a block."""
    coordinate = _low(weight)
    weights = formed(coordinate, _moved(weight, torch.float32))
    rows = flat.view(len(weights), -1, flat.shape[1])
    out = flat.new_empty(*rows.shape[:2], weights.shape[1])
    for block, one in enumerate(weights):
        _product(rows[block], one, bias, block, out[block])
    return out


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, block: int, out: Tensor) -> None:
    """out ← x Wᵀ + b of one block."""
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias.full()[block] if isinstance(bias, Stacked) else bias, rows, weight.T, out=out)


def _low(weight: Stacked) -> LowRankCoordinate:
    coordinate = weight.low_rank
    assert coordinate is not None
    return coordinate


def _beside(first: Tensor | None, x: Tensor, weight: Stacked, *, fixed_first: bool) -> Tensor:
    """What W's product is added to: the side path and the bias, (B, q, width), in as many passes over it as a bias takes alone.

    The input meets the fixed factor first, whose product siblings share, or the moving factor of its block.
    """
    coordinate, blocks = _low(weight), weight.lending.blocks
    moved = _moved(weight, x.dtype)
    if fixed_first:
        left, right = weight.lending.thin(coordinate, x), moved.transpose(1, 2)
    else:
        v = coordinate.v.T.to(x.dtype)
        left, right = torch.bmm(x.reshape(blocks, -1, x.shape[-1]), moved), v.expand(blocks, *v.shape)
    if first is None:
        return torch.bmm(left, right)
    kernel = products_for(left, left.shape[2])
    if kernel is not None:
        return kernel.outer(first, left, right)
    if left.shape[2] == 1:
        return torch.addcmul(first, left, right)  # several times faster than a batched product with nothing to sum over
    return torch.baddbmm(first, left, right)


def _moved(weight: Stacked, dtype: torch.dtype) -> Tensor:
    """The moving factor A + s U_g of every block, (B, rows of A, r)."""
    coordinate = _low(weight)
    if type(coordinate).expand is LowRankCoordinate.expand:
        return weight.lending.values(coordinate, dtype)
    return coordinate.expand(weight.lending.values(coordinate, torch.float32)).to(dtype)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """y = b + x W, W (n, m): GPT-2's Conv1D. Its A belongs to the input's side: x (A + s U_g), then Vᵀ."""
    _no_more(x, scaled=beta != 1 or alpha != 1)
    lending = _lending(bias, weight)
    blocks, width = lending.blocks, weight.shape[1]
    x = lending.spread(x, 1)
    rows = x.reshape(blocks, -1, x.shape[-1])
    if isinstance(weight, Stacked) and weight.low_rank is None:
        first = bias.full().unsqueeze(1) if isinstance(bias, Stacked) else bias
        return torch.baddbmm(first, rows, weight.full()).view(-1, width)
    first, plain = (bias.full().unsqueeze(1) if isinstance(bias, Stacked) else bias), _plain(weight)
    assert plain is not None
    if isinstance(weight, Stacked):
        output = _beside(first, x, weight, fixed_first=_low(weight).transposed)
    else:
        output = first.expand(blocks, rows.shape[1], width).contiguous()
    return output.view(-1, width).addmm_(x, plain)


def _embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """y = W[ids]."""
    _no_more(ids, rescaled=max_norm is not None)
    assert isinstance(weight, Stacked)
    lending = weight.lending
    if ids.dim() == 2 and ids.shape[0] % lending.total == 0:
        lending.lead = ids.shape[0]
    ids = lending.spread(ids, 0)
    blocks, height = lending.blocks, weight.shape[0]
    by_block = ids.reshape(blocks, -1)
    if not weight.coordinate.thin:
        return torch.stack([_looked_up(weight, offset, some) for offset, some in zip(weight.offsets(), by_block, strict=True)]).view(
            *ids.shape, -1
        )
    coordinate = weight.low_rank
    if coordinate is None:
        table = weight.full().flatten(0, 1)
        first = torch.arange(blocks, device=ids.device).unsqueeze(1) * height
        return F.embedding((by_block + first).view(ids.shape), table)
    output = F.embedding(ids, weight.plain)
    if coordinate.transposed:
        left = F.embedding(by_block, coordinate.v).to(output.dtype)
        output.view(blocks, -1, output.shape[-1]).baddbmm_(left, _moved(weight, output.dtype).transpose(1, 2))
        return output
    z = lending.z(coordinate)
    groups, rank = z.shape[0], coordinate.rank
    by_group = ids.reshape(groups, -1)
    first = torch.arange(groups, device=ids.device).unsqueeze(1) * height
    left = F.embedding(by_group + first, z.flatten(0, 1)).view(groups, blocks // groups, -1, rank)
    left = left * lending.scales(z, 2)
    if coordinate.pending or lending.hold:
        left += F.embedding(by_block, coordinate.a).view(left.shape)
    output.view(-1, output.shape[-1]).addmm_(left.view(-1, rank).to(output.dtype), coordinate.v.T.to(output.dtype))
    return output


def _looked_up(weight: Stacked, offset: Offset | None, ids: Tensor) -> Tensor:
    """(W + s Z)[ids] of a table in full space."""
    coordinate, directions = weight.coordinate, weight.lending.directions
    assert isinstance(coordinate, FullCoordinate)
    if weight.lending.hold:
        return weight.lending.rows(coordinate, offset, ids)
    found = None if offset is None else rows_looked_up(coordinate, directions, offset, ids)
    return F.embedding(ids, coordinate.at(directions, offset)) if found is None else found


# -- vectors ------------------------------------------------------------------------------------------------------------------------------


def _by_block(x: Tensor, lending: Lending, size: int) -> Tensor:
    """x (..., n) as (B, q, n)."""
    if x.shape[-1] != size:
        raise NotStackable(f"a vector of {size} numbers meets rows of {x.shape[-1]}")
    return lending.spread(x, 1).reshape(lending.blocks, -1, size)


def _affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """rows (B, q, n) · w + b with a vector a block, or the same one for all."""
    w, b = (t.full().unsqueeze(1) if isinstance(t, Stacked) else t for t in (weight, bias))
    if w is None:
        return rows if b is None else rows.add_(b)
    return rows.mul_(w) if b is None else torch.addcmul(b, rows, w)


def _layer_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    _no_more(x, several_dimensions=len(normalized_shape) != 1)
    lending = _lending(weight, bias)
    x = lending.spread(x, 1)
    kernel = norms_for(x)
    if kernel is not None:
        vectors = (vector.full() if isinstance(vector, Stacked) else vector for vector in (weight, bias))
        return kernel.layer_norm(_by_block(x, lending, x.shape[-1]), *vectors, eps).view(x.shape)
    rows = _by_block(F.layer_norm(x, normalized_shape, None, None, eps), lending, x.shape[-1])
    return _affine(rows, weight, bias).view(x.shape)


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    _no_more(x, several_dimensions=len(normalized_shape) != 1)
    lending = _lending(weight)
    x = lending.spread(x, 1)
    return _affine(_by_block(F.rms_norm(x, normalized_shape, None, eps), lending, x.shape[-1]), weight, None).view(x.shape)


def _elementwise(operation: Callable[[Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    """A commuting operation of a vector with rows, or with a number (which gives a stacked vector again)."""

    def apply(one: Any, other: Any) -> Tensor:
        vector, x = (one, other) if isinstance(one, Stacked) else (other, one)
        if vector.plain.dim() != 1 or isinstance(x, Stacked):
            raise NotStackable(f"the model computes with {vector.coordinate.name}, which has no batched form")
        if not isinstance(x, Tensor) or x.dim() == 0:
            return Stacked.of(operation(vector.plain, x), vector.coordinate, vector.lending, operation(vector.full(), x))
        rows = _by_block(x, vector.lending, vector.plain.shape[0])
        lead = x.shape if x.shape[0] != 1 else (vector.lending.lead, *x.shape[1:])
        return operation(rows, vector.full().unsqueeze(1)).view(lead)

    return apply


def _cast(method: str) -> Callable[..., Tensor]:
    def apply(vector: Stacked, *args: Any, **kwargs: Any) -> Tensor:
        plain = getattr(vector.plain, method)(*args, **kwargs)
        if plain is vector.plain:
            return vector
        if plain.dim() != 1:
            raise NotStackable(f"the model converts {vector.coordinate.name} to {plain.dtype}")
        return Stacked.of(plain, vector.coordinate, vector.lending, vector.full().to(plain.dtype))

    return apply


_mul, _add = _elementwise(torch.mul), _elementwise(torch.add)
#: By the name under which ``__torch_function__`` is told of them.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "addmm": _addmm,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    **{method: _cast(method) for method in ("to", "float", "half", "bfloat16", "type_as")},
}
