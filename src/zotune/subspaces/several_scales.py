"""W + s Z for several s at once: Z is drawn and W is read once a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zotune.rng.directions import Directions, Key, for_blocks


def perturb_at_scales(
    directions: Directions,
    key: Key,
    scales: Sequence[float],
    unit: float,
    block: Callable[[slice], Tensor],
    device: torch.device,
    strips: Sequence[Tensor],
    whole: slice,
) -> None:
    """Write elements ``whole`` of W + s Z to a strip for every s of ``scales``.

    Args:
        directions, key: of Z.
        scales: s.
        unit: the factor of Z's elements.
        block: the float32 elements of W in a slice.
        device: of W.
        strips: flat, one for each s.
        whole: elements of W.
    """
    largest = max(scales, key=abs)
    # Scales with a draw of their own come last: the draw overwrites ``move``.
    ordered = sorted(zip(scales, strips, strict=True), key=lambda pair: abs(pair[0]) != abs(largest))

    def perturb(part: slice) -> None:
        move = directions.block(key, part, device, largest * unit)
        base = block(part)
        target = slice(part.start - whole.start, part.stop - whole.start)
        for scale, strip in ordered:
            if scale == largest:
                torch.add(base, move, out=strip[target])
            elif scale == -largest:
                torch.sub(base, move, out=strip[target])
            elif scale:
                torch.add(base, directions.block(key, part, device, scale * unit), out=strip[target])
            else:
                strip[target].copy_(base)

    for_blocks(whole.stop, device, perturb, whole.start)
