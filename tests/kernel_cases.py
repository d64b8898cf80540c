"""Run under triton's interpreter (TRITON_INTERPRET=1): every case of the kernel against the plain reference, on CPU tensors."""

import torch

from zotune.coordinates import Offset
from zotune.directions import Directions, Key
from zotune.kernels import moves_for
from zotune.precision import join, split
from zotune.subspaces import Full

KEY = Key(seed=3, step=4, direction=1, name="w")


def reference(directions: Directions, w: torch.Tensor, scale: float, keep: float = 1.0) -> torch.Tensor:
    return w * keep + directions.draw(KEY, w.shape) * scale


def numbers(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count))


def main() -> None:
    for kind in ("gaussian", "rademacher"):
        directions = Directions(kind)
        for count in (1, 7, 768, 2049, 140_003):  # the last one: two pages of normals
            w = numbers(count)
            kernel = moves_for(w, None)
            assert kernel is not None
            out = torch.empty_like(w)
            kernel.perturb(directions, KEY, 1e-3, w, None, out)
            assert torch.equal(out, reference(directions, w, 1e-3)), (kind, count)
            updated = w.clone()
            kernel.update(directions, KEY, -1e-5, updated, None, keep=0.99)
            assert torch.equal(updated, reference(directions, w, -1e-5, keep=0.99)), (kind, count)

            half, residual = split(w, torch.bfloat16)
            out = torch.empty_like(half)
            kernel.perturb(directions, KEY, 1e-3, half, residual, out)
            assert torch.equal(out, reference(directions, w, 1e-3).bfloat16()), (kind, count)
            kernel.update(directions, KEY, -1e-5, half, residual)
            assert torch.equal(join(half, residual), reference(directions, w, -1e-5)), (kind, count)
            expected, _ = split(reference(directions, w, -1e-5), torch.bfloat16)
            assert torch.equal(half, expected), (kind, count)
    # numbers do not depend on how many words a program makes
    small = torch.empty(5000)
    kernel.perturb(Directions("gaussian"), KEY, 1.0, torch.zeros(5000), None, small)
    kernel._TILE = 512
    smaller = torch.empty(5000)
    kernel.perturb(Directions("gaussian"), KEY, 1.0, torch.zeros(5000), None, smaller)
    assert torch.equal(small, smaller)
    # coordinates take the kernel where it fits
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(numbers(70 * 90).view(70, 90).to(dtype), requires_grad=False)
        before = parameter.clone().float().view(-1)
        coordinate = Full().coordinate("w", parameter)
        moved = coordinate.at(Directions("gaussian"), Offset(1e-2, 3, 4, 1))
        assert torch.equal(moved.view(-1), reference(Directions("gaussian"), before, 1e-2).to(dtype))
        coordinate.descend(Directions("gaussian"), [0.0, 1e-4], 0.5, 3, 4)
        assert torch.equal(coordinate.value().view(-1), reference(Directions("gaussian"), before, 1e-4, keep=0.5))
    print("kernel equals reference")


if __name__ == "__main__":
    main()
