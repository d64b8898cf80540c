"""Every case of the kernel against the plain reference: under triton's interpreter (TRITON_INTERPRET=1) on CPU tensors, or on a device."""

import copy
import math

import torch

import zotune.forward.materialized
from zotune.kernels import layer_norm_kernels, low_rank_kernels, perturb_kernels
from zotune.rng.device_keys import DeviceKeys
from zotune.rng.directions import Directions, Key
from zotune.subspaces import Full
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.full import rounding_key
from zotune.weights.precision import join, split, stochastic_round

KEY = Key(seed=3, step=4, direction=1, name="w")
ROUNDING = rounding_key(KEY.seed, KEY.step, KEY.name)


def reference(directions: Directions, w: torch.Tensor, scale: float, keep: float = 1.0) -> torch.Tensor:
    return w * keep + directions.draw(KEY, w.shape, w.device) * scale


def check(device: torch.device) -> None:
    def numbers(count: int) -> torch.Tensor:
        return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(device)

    for kind in ("gaussian", "rademacher"):
        directions = Directions(kind)
        for count in (1, 7, 768, 2049, 140_003):  # the last one: two pages of normals
            w = numbers(count)
            kernel = perturb_kernels(w)
            assert kernel is not None
            out = torch.empty_like(w)
            kernel.perturb(directions, KEY, 1e-3, w, None, out)
            assert torch.equal(out, reference(directions, w, 1e-3)), (kind, count)
            both = torch.empty(2, count, device=device)
            kernel.perturb_pair(directions, KEY, 1e-3, w, None, both)
            assert torch.equal(both[0], out) and torch.equal(both[1], reference(directions, w, -1e-3)), (kind, count)
            updated = w.clone()
            kernel.update(directions, KEY, -1e-5, updated, None, 0.99, ROUNDING)
            assert torch.equal(updated, reference(directions, w, -1e-5, keep=0.99)), (kind, count)

            half, residual = split(w, torch.bfloat16)
            out = torch.empty_like(half)
            kernel.perturb(directions, KEY, 1e-3, half, residual, out)
            assert torch.equal(out, reference(directions, w, 1e-3).bfloat16()), (kind, count)
            kernel.perturb_pair(directions, KEY, 1e-3, half, residual, both := torch.empty(2, count, dtype=half.dtype, device=device))
            assert torch.equal(both[0], out) and torch.equal(both[1], reference(directions, w, -1e-3).bfloat16()), (kind, count)
            alone = half.clone()
            kernel.perturb(directions, KEY, 1e-3, alone, None, out)
            assert torch.equal(out, reference(directions, alone.float(), 1e-3).bfloat16()), (kind, count)
            expected = stochastic_round(reference(directions, alone.float(), -1e-5, keep=0.99), alone.dtype, ROUNDING)
            kernel.update(directions, KEY, -1e-5, alone, None, 0.99, ROUNDING)
            assert torch.equal(alone, expected), (kind, count)
            kernel.update(directions, KEY, -1e-5, half, residual, 1.0, ROUNDING)
            assert torch.equal(join(half, residual), reference(directions, w, -1e-5)), (kind, count)
            expected, _ = split(reference(directions, w, -1e-5), torch.bfloat16)
            assert torch.equal(half, expected), (kind, count)
        check_rows_and_fleets(directions, device)
    # numbers do not depend on how many words a program makes
    small = torch.empty(5000, device=device)
    kernel.perturb(Directions("gaussian"), KEY, 1.0, torch.zeros(5000, device=device), None, small)
    tile, kernel.TILE = kernel.TILE, 512
    smaller = torch.empty(5000, device=device)
    kernel.perturb(Directions("gaussian"), KEY, 1.0, torch.zeros(5000, device=device), None, smaller)
    kernel.TILE = tile
    assert torch.equal(small, smaller)
    # coordinates take the kernel where it fits
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(numbers(70 * 90).view(70, 90).to(dtype), requires_grad=False)
        before = parameter.clone().float().view(-1)
        coordinate = Full().coordinate("w", parameter)
        moved = coordinate.at(Directions("gaussian"), Offset(1e-2, 3, 4, 1))
        assert torch.equal(moved.view(-1), reference(Directions("gaussian"), before, 1e-2).to(dtype))
        coordinate.descend(Directions("gaussian"), [0.0, 1e-4], 0.5, 3, 4)
        expected = reference(Directions("gaussian"), before, 1e-4, keep=0.5)
        assert torch.equal(coordinate.value().view(-1), stochastic_round(expected, dtype, ROUNDING).to(expected.dtype))
        # several directions are rounded once, without the kernel
        before = coordinate.value().view(-1).clone()
        coordinate.descend(Directions("gaussian"), [1e-4, 1e-4], 1.0, 3, 4)
        first = torch.add(before, Directions("gaussian").draw(KEY._replace(direction=0), before.shape, device) * 1e-4)
        expected = reference(Directions("gaussian"), first, 1e-4)
        assert torch.equal(coordinate.value().view(-1), stochastic_round(expected, dtype, ROUNDING).to(expected.dtype))
    check_products(device)
    check_norms(device)


def check_rows_and_fleets(directions: Directions, device: torch.device) -> None:
    """Rows alone, keys that are read from the device, and many weights at once: all the same numbers."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(*shape, generator=generator).to(device) for shape in ((70, 90), (3, 700), (130, 66))]
    rows = torch.tensor([2, 0, 2, 1], device=device)
    keys = DeviceKeys(directions, KEY.seed, 0, device)
    for dtype in (torch.float32, torch.bfloat16):
        pairs = [(w, None) if dtype == w.dtype else split(w, dtype) for w in weights]
        kernel = perturb_kernels(pairs[0][0])
        values = [w.clone() if residual is None else join(w, residual) for w, residual in pairs]
        for name, (w, residual), value in zip("abc", pairs, values, strict=True):
            key = KEY._replace(name=name)
            source = keys.source(name, key.direction, 1e-3)
            expected = (value + directions.draw(key, w.shape, device) * 1e-3).to(dtype)
            found = kernel.perturb_rows(directions, key, 1e-3, w, residual, rows)
            assert torch.equal(found, expected[rows])
            keys.advance(KEY.seed, KEY.step)
            assert torch.equal(kernel.perturb_rows(directions, key, 1e-3, w, residual, rows, source), found)
            flat = None if residual is None else residual.view(-1)
            kernel.perturb_pair(
                directions, key, 1e-3, w.view(-1), flat, both := torch.empty(2, *w.shape, dtype=dtype, device=device), source
            )
            assert torch.equal(both[0], expected)
        residuals = None if pairs[0][1] is None else [residual.view(-1) for _, residual in pairs]
        many = kernel.MultiTensorUpdate([w.view(-1) for w, _ in pairs], residuals)
        keys_of = [KEY._replace(name=name) for name in "abc"]
        roundings = [rounding_key(KEY.seed, KEY.step, name) for name in "abc"]
        alone = [w.clone() for w, _ in pairs]
        many.update(directions, keys_of, roundings, -1e-5, 0.9)
        for name, (w, residual), value in zip("abc", pairs, values, strict=True):
            moved = value * 0.9 + directions.draw(KEY._replace(name=name), w.shape, device) * -1e-5
            assert torch.equal(w if residual is None else join(w, residual), moved), name
        if residuals is not None:
            updated = [w.clone() for w in alone]
            kernel.MultiTensorUpdate([w.view(-1) for w in updated], None).update(directions, keys_of, roundings, -1e-5, 0.9)
            for key, rounding, w, found in zip(keys_of, roundings, alone, updated, strict=True):
                moved = w.float() * 0.9 + directions.draw(key, w.shape, device) * -1e-5
                assert torch.equal(found.view(-1), stochastic_round(moved.view(-1), dtype, rounding)), key


def check_products(device: torch.device) -> None:
    """W + A Vᵀ: like the plain product but for the rounding of its sums; where that makes no difference, rounded alike."""
    for m, n, rank in ((70, 90, 1), (33, 7, 3), (5, 300, 16)):
        generator = torch.Generator().manual_seed(m)
        w, left = torch.randn(m, n, generator=generator).to(device), torch.randn(2, m, rank, generator=generator).to(device)
        right = torch.randn(rank, n, generator=generator).to(device).T
        for dtype in (torch.float32, torch.bfloat16):
            stored, exact = w.to(dtype), w.to(dtype) + left @ right.T
            kernel = low_rank_kernels(stored, rank)
            found = kernel.add_low_rank(stored, None, left, right)
            assert found.dtype == dtype and torch.allclose(
                found.float(), exact.to(dtype).float(), rtol=1e-2 if dtype != w.dtype else 1e-5, atol=1e-5
            )
            kernel.fold(folded := stored.clone(), None, left[0], right, 0.5, KEY)
            value = 0.5 * stored.float() + left[0] @ right.T
            assert torch.allclose(folded.float(), value, rtol=1e-2 if dtype != w.dtype else 1e-5, atol=1e-5)
            q = torch.randn(3, 11, rank, generator=generator).to(device, dtype)
            r, bias = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((3, rank, n), (3, 1, n)))
            for b in (bias, bias[0, 0]):
                expected = (b.float() + q.float() @ r.float()).to(dtype)
                assert torch.allclose(kernel.outer(b, q, r).float(), expected.float(), rtol=1e-2 if dtype != w.dtype else 1e-5, atol=1e-4)
        # products without rounding: the dither, and the residual, are those of the plain code, bit for bit
        left, right = left.sign(), right.sign() * 2.0**-9
        value = stored.float() + left[0] @ right.T
        kernel.fold(folded := stored.clone(), None, left[0], right, 1.0, KEY)
        assert torch.equal(folded.view(-1), stochastic_round(value.view(-1), torch.bfloat16, KEY))
        half, residual = split(w.view(-1), torch.bfloat16)
        value = join(half, residual).view(m, n) + left[0] @ right.T
        kernel.fold(half.view(m, n), residual, left[0], right, 1.0, KEY)
        assert torch.allclose(join(half, residual).view(m, n), value, rtol=1e-6, atol=1e-7)


def check_norms(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*shape, generator=generator).to(device) for shape in ((3, 5, 70), (3, 70), (3, 70)))
    for weight, bias in ((w, b), (w[0], b), (w, None), (None, b[0])):
        found = layer_norm_kernels(x).layer_norm(x, weight, bias, 1e-5)
        ones = torch.ones(3, 70, device=device)
        rows = zip(x, ones * (1 if weight is None else weight), ones * (0 if bias is None else bias), strict=True)
        expected = torch.stack([torch.nn.functional.layer_norm(one, (70,), scale, shift) for one, scale, shift in rows])
        assert torch.allclose(found, expected, atol=1e-5)
    assert layer_norm_kernels(x.bfloat16()).layer_norm(x.bfloat16(), None, None, 1e-5).dtype == torch.bfloat16


def check_layers(device: torch.device) -> None:
    """A layer materializes its weight for many tokens, batched or sequential, and uses the hook for few."""
    x = torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(2)).to(device)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.LayerNorm(32), torch.nn.GELU(), torch.nn.Linear(32, 8)).to(dtype)
        found = {}
        for passes in (1.5, math.inf):
            zotune.forward.materialized.PASSES = passes
            for forward_batching in ("batched", "sequential"):
                twin = copy.deepcopy(model)
                optimizer = zotune.ZerothOrder(twin, zotune.methods.lozo(eps=1e-2), lr=1e-2, seed=3, forward_batching=forward_batching)
                for _ in range(3):
                    optimizer.step(lambda rows, twin=twin: twin(rows).float().square().mean(dim=(1, 2)), x.to(dtype))
                low_rank = [c for group in optimizer.run.state.coordinates for c in group if len(c.shape) == 2]
                assert all(zotune.forward.materialized.should_materialize(c, 80) == (passes == 1.5) for c in low_rank)
                found[passes, forward_batching] = optimizer.last_report.coefficients
        expected = found[math.inf, "sequential"]
        for way, coefficients in found.items():
            assert torch.allclose(coefficients, expected, rtol=close, atol=20 * close), (dtype, way, coefficients, expected)
    zotune.forward.materialized.PASSES = 1.5


if __name__ == "__main__":
    check(torch.device("cpu"))
    check_layers(torch.device("cpu"))
    print("kernel equals reference")
