"""Step sizes from theory: the learning rate of a method on a loss whose gradient g and Hessian H are known.

Along K directions of N(0, I), a step of plain SGD changes the loss on average by

    −η ‖g‖² + ½ η² ρ ‖g‖²,   ρ = tr(H) / K + (1 + 1/K) gᵀHg / ‖g‖²,

which is lowest at η* = 1 / ρ. Where H = I in d dimensions, ρ = 1 + (d + 1) / K, and a step at ½ η* leaves 1 − ¾ / ρ of the loss
(2305.17333, theorem 1). Other rules take steps as long as those of plain SGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zotune import methods
from zotune.methods.best import BestPoint
from zotune.methods.coefficients import State
from zotune.methods.output_window import OutputWindow
from zotune.methods.rules import Rule
from zotune.optim.calibration.gains import gain, measurable
from zotune.subspaces import Activation, RankOnes


class Slope(NamedTuple):
    """A loss at one point: ‖g‖², gᵀHg / ‖g‖², tr(H), and the shapes of the parameters."""

    square: float
    along: float
    trace: float
    shapes: list[torch.Size]

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)


def row_means(shapes: list[torch.Size]) -> Tensor:
    """An orthonormal basis of the space in which every row of a matrix changes as a whole, (d, rows)."""
    columns = [(shape[-1] if len(shape) == 2 else 1) for shape in shapes]
    blocks = [torch.full((n, 1), n**-0.5) for shape, n in zip(shapes, columns, strict=True) for _ in range(shape.numel() // n)]
    return torch.block_diag(*blocks)


def slope(model: nn.Module, loss: Callable[[], Tensor], reach: str = "all") -> Slope:
    """By backprop, twice; of the part of the space that a method can train (see ``Method.reach``)."""
    parameters = list(model.parameters())
    shapes = [p.shape for p in parameters]
    with torch.enable_grad():
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss(), parameters, create_graph=True)])
        rows = torch.autograd.grad(g, parameters, torch.eye(len(g)), is_grads_batched=True, materialize_grads=True)
    hessian, g = torch.cat([row.reshape(len(g), -1) for row in rows], dim=1), g.detach()
    if reach == "rows":
        basis = row_means(shapes)
        hessian, g = basis.T @ hessian @ basis, basis.T @ g
    square = float(g.square().sum())
    return Slope(square, float(g @ hessian @ g) / max(square, 1e-30), float(hessian.trace()), shapes)


def unit_length(method: methods.Method, at: Slope, step: int) -> float:
    """The length of a step at η = 1, for the rules whose steps are as long whatever the size of the estimate."""
    rule = Rule(method.update_rule, method.update_rule_args)
    name, squares = rule.cls.__name__, float(at.size)
    if name in ("Orthogonal", "PartialOrthogonal", "JaguarMuon"):
        squares = sum(min(shape) if len(shape) == 2 and min(shape) > 1 else shape.numel() for shape in at.shapes)
    if name == "RAdaZO":  # m / √v of means m that v, which starts at 0, averages the squares of
        first, second = rule.options["betas"]
        squares *= (1 + first) / (1 - first) / (1 - second ** (step + 1))
    return math.sqrt(squares)


def repeats(method: methods.Method, at: Slope) -> float:
    """Steps that use one estimate: until its elements are chosen again, or until the next SVRG snapshot."""
    if method.svrg is not None:
        return method.svrg.interval
    if method.direction == "row":
        return max(1.0, max(shape[0] for shape in at.shapes) / method.num_directions)
    if method.direction.startswith("block:"):
        rows, columns = (int(size) for size in method.direction.removeprefix("block:").split("x"))
        return max(1.0, max(shape.numel() for shape in at.shapes) / (rows * columns * method.num_directions))
    return 1.0


def step_size(method: methods.Method, at: Slope, step: int = 0, state: State | None = None) -> float:
    """The η at which a step is as long as one of plain SGD at ½ η*; ``state``: of the shaping."""
    directions = method.num_directions
    noise = max(at.trace, 0.0) / directions + (1 + 1 / directions) * abs(at.along)
    if type(method.subspace) is Activation:  # directions in the span of the inputs, where all of the curvature is
        noise *= max(max(1.0, shape[-1] / method.subspace.rank) for shape in at.shapes)
    if isinstance(method.subspace, RankOnes):  # directions are sums of r matrices
        noise *= method.subspace.rank
    half = 0.5 / noise / repeats(method, at)
    if method.svrg is not None or isinstance(method.history, OutputWindow):  # plain SGD
        return half
    if measurable(method):
        return half * gain(method, Rule(method.update_rule, method.update_rule_args), at.square, directions, method.eps, step, state)
    if isinstance(method.shaping, BestPoint):  # the lowest of K normal slopes is about 1 + ½ log K deviations away
        return half * math.sqrt(at.square) * (1 + math.log(directions) / 2) / (directions * method.eps * max(method.shaping.radii))
    length = math.sqrt((1 + (at.size + 1) / directions) * at.square)  # of plain SGD's steps at η = 1
    return half * length / unit_length(method, at, step)
